"""`convert_dba.py mask` in a process that kills itself before its N-th step is logged, with half a line in the log.

    python3 tests/surgery/kill_mask.py N mask --model ...
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import convert_dba
import train_dba
from surgery import learn_mask


def die_at(count, argv):
    steps, append_line = [], train_dba.append_line

    def appending(path, **line):
        steps.append(line)
        if len(steps) == count:
            with open(path, "a") as f:
                f.write(json.dumps(line)[:20])
            os.kill(os.getpid(), signal.SIGKILL)
        append_line(path, **line)

    learn_mask.SAVE_EVERY, train_dba.append_line = 2, appending
    return convert_dba.main(argv)


if __name__ == "__main__":
    sys.exit(die_at(int(sys.argv[1]), sys.argv[2:]))
