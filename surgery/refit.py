"""
Output projections of a converted model, fitted anew to the stream that it has itself.

A conversion fits each layer to the teacher's stream, but the errors of one layer are inputs of the next. Here the
layers' W_o are fitted in turn, by least squares on calibration text: from what the student's heads read there to what
the teacher's attention adds to its own stream and what the student's stream lacks by then.
"""

import torch
from torch import Tensor

from surgery.calibrate import SINK
from train_dba import GPT, Attention

RIDGE = 0.1                                                # that draws W_o to what it was, in units of E z²
SILENT = 1e-30                                             # of heads that read nothing, whose W_o stays


def heads_read(attn: Attention, x: Tensor) -> Tensor:
    """z [B, T, H·v], what W_o multiplies where attention's input is x [B, T, D]."""
    read = []
    hook = attn.o.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    attn(x)
    hook.remove()
    return read[0]


@torch.no_grad()
def refit_outputs(teacher: GPT, student: GPT, windows: Tensor, report=lambda done, total: None) -> None:
    """Change the student's output projections in place, so that its stream comes nearest to the teacher's after each
    layer's attention, on windows of tokens [N, T]; the first SINK tokens of a window don't count."""
    theirs = [teacher.embed_up(teacher.embed(window[None])) for window in windows]                  # streams [1, T, D]
    ours = [stream.clone() for stream in theirs]
    for i, (block, own) in enumerate(zip(teacher.blocks, student.blocks)):
        read, n_read = [], own.attn.o.in_features
        gram = torch.zeros(n_read, n_read, dtype=torch.float64)                 # zᵀ z
        cross = torch.zeros(n_read, own.attn.o.out_features, dtype=torch.float64)
        for n in range(len(windows)):
            theirs[n] = theirs[n] + block.attn(block.attn_norm(theirs[n]))
            z = heads_read(own.attn, own.attn_norm(ours[n]))
            lacking = theirs[n] - ours[n] - own.attn.o(z)
            read.append(z)
            z, lacking = (each[0, SINK:].double() for each in (z, lacking))
            gram += z.T @ z
            cross += z.T @ lacking
        gram.diagonal().add_(RIDGE * gram.diagonal().mean() + SILENT)
        own.attn.o.weight += torch.linalg.solve(gram, cross).T
        for n in range(len(windows)):
            ours[n] = ours[n] + own.attn.o(read[n])
            theirs[n], ours[n] = (stream + layer.mlp(layer.mlp_norm(stream))
                                  for layer, stream in ((block, theirs[n]), (own, ours[n])))
        report(i + 1, len(teacher.blocks))
