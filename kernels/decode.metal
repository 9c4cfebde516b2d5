// Split-KV decode attention over a quantised, channel-major cache. metal_decode.py launches these kernels.
//
// One simdgroup takes one query and SPLIT slots of the cache, a token per lane: neighbouring lanes read neighbouring
// bytes, every width of a head will do, and simd_max and simd_sum are all that lanes exchange, so that there is neither
// threadgroup memory nor a barrier. A second kernel merges the splits with the null token.
//
// Formats and widths are arguments, so one compilation serves every cache; the format becomes a template's constant
// outside the loops over channels. ASCII only: torch hands Metal the source as ASCII. Pointers, floats and simd_* are
// all of Metal that is used, so that tests/metal_shim can compile this file as C++.

#include <metal_stdlib>
using namespace metal;

constant constexpr uint SIMD = 32;                  // lanes of a simdgroup; metal_decode.py looks for SIMD and SPLIT
constant constexpr uint SPLIT = 256;                // slots that a simdgroup reads
constant constexpr uint PER_LANE = SPLIT / SIMD;
constant constexpr uint BLOCK = 32;                 // channels that share a scale

enum : uint { FP32, BF16, FP16, Q8_0, Q4_0, Q4_SYM, NF4 };          // in the order of metal_decode.FORMATS
constant float NF4_LEVELS[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

struct Layout { uint format, width; };              // of a stream; width: channels of a group

struct Part {                                       // of the cache: the settled tokens (window 0), or the ring
    uint heads, groups, tokens;                     // H, G, T
    uint slots, window;                             // slots allocated; positions that the ring wraps around at
    uint splits, first_split, all_splits;           // of this part; those before it; of both parts
    Layout keys[2], values;                         // a missing second path of scores has width 0
};

struct Result {
    uint heads, groups, tokens, width;              // H, G, T, v
    uint splits, null;                              // null: whether there is a null token
};

struct Stream {                                     // of one sequence and group
    device const uchar* codes;                      // [rows, slots]
    device const half* scales;                      // [blocks, slots]
    uint format, first, last, slots;                // the group's channels: first ... last - 1
};

Stream open(device const uchar* codes, device const half* scales, constant Layout& layout, constant Part& part, uint b,
            uint g) {
    uint channels = part.groups * layout.width, blocks = (channels + BLOCK - 1) / BLOCK;
    uint rows = layout.format < Q4_0 ? channels : (channels + 1) / 2;
    uint bytes = layout.format == FP32 ? 4 : layout.format < Q8_0 ? 2 : 1;
    Stream s;
    s.codes = codes + ulong(b) * rows * part.slots * bytes;
    s.scales = scales + ulong(b) * blocks * part.slots;
    s.format = layout.format;
    s.first = g * layout.width;
    s.last = s.first + layout.width;
    s.slots = part.slots;
    return s;
}

// What a slot holds of one channel, in units of the scale.
template <uint format> float code(Stream s, uint channel, uint slot) {
    ulong at = ulong(format < Q4_0 ? channel : channel / 2) * s.slots + slot;
    if (format == FP32) return ((device const float*)s.codes)[at];
    if (format == BF16) return as_type<float>(uint(((device const ushort*)s.codes)[at]) << 16);    // Metal 3.0 has none
    if (format == FP16) return float(((device const half*)s.codes)[at]);
    if (format == Q8_0) return float(((device const char*)s.codes)[at]);
    uint nibble = channel % 2 == 0 ? s.codes[at] & 15 : s.codes[at] >> 4;
    return format == NF4 ? NF4_LEVELS[nibble] : float(nibble) - 8.0f;
}

template <uint format> float scale(Stream s, uint channel, uint slot) {
    return format < Q8_0 ? 1.0f : float(s.scales[ulong(channel / BLOCK) * s.slots + slot]);
}

// Product of a query [width] with the key in a slot. A head may straddle blocks; each scale is read once.
template <uint format> float score(Stream s, device const float* q, uint slot) {
    float sum = 0.0f;
    for (uint c = s.first, stop; c < s.last; c = stop) {
        stop = min(s.last, (c / BLOCK + 1) * BLOCK);
        float part = 0.0f;
        for (uint i = c; i < stop; i++) part += q[i - s.first] * code<format>(s, i, slot);
        sum += part * scale<format>(s, c, slot);
    }
    return sum;
}

// One lane's share of the weighted sum of a channel. What has weight 0 may be no token, and its value NaN.
template <uint format> float weigh(Stream s, thread const float* weights, uint channel, uint slot) {
    float sum = 0.0f;
    for (uint n = 0; n < PER_LANE; n++, slot += SIMD)
        if (weights[n] != 0.0f) sum += weights[n] * scale<format>(s, channel, slot) * code<format>(s, channel, slot);
    return sum;
}

#define OF_FORMAT(f, s, ...) \
    (s.format == FP32 ? f<FP32>(s, __VA_ARGS__) : s.format == BF16 ? f<BF16>(s, __VA_ARGS__) : \
     s.format == FP16 ? f<FP16>(s, __VA_ARGS__) : s.format == Q8_0 ? f<Q8_0>(s, __VA_ARGS__) : \
     s.format == NF4 ? f<NF4>(s, __VA_ARGS__) : f<Q4_0>(s, __VA_ARGS__))            // Q4_SYM decodes as Q4_0

// One simdgroup for each split of each query. It writes the largest score, the sum of exponentials above it and their
// weighted sum of values: partials [B, H, T, all_splits, 2 + v].
kernel void attend(device const float* q,           // [B, H, T, w]
                   device const long* pos,          // [B, T]
                   device const long* settled,      // [B]
                   device const uchar* key0, device const half* scales0,
                   device const uchar* key1, device const half* scales1,
                   device const uchar* value, device const half* value_scales,
                   device float* partials,
                   constant Part& part,
                   uint i [[thread_position_in_grid]]) {
    uint lane = i % SIMD, split = i / SIMD % part.splits, row = i / SIMD / part.splits;
    uint t = row % part.tokens, h = row / part.tokens % part.heads, b = row / part.tokens / part.heads;
    uint g = h / (part.heads / part.groups), now = uint(pos[b * part.tokens + t]), held = uint(settled[b]);
    Stream k0 = open(key0, scales0, part.keys[0], part, b, g), k1 = open(key1, scales1, part.keys[1], part, b, g);
    Stream v = open(value, value_scales, part.values, part, b, g);
    q += ulong(row) * (part.keys[0].width + part.keys[1].width);

    float weights[PER_LANE], top = -FLT_MAX;
    uint start = split * SPLIT + lane, window = part.window, oldest = window ? held % window : 0;
    for (uint n = 0; n < PER_LANE; n++) {
        uint slot = start + n * SIMD;
        uint position = window ? held + (slot + window - oldest) % window : slot;
        bool visible = slot < (window ? window : held) && position <= now;
        weights[n] = -FLT_MAX;                      // finite, so that no rule about infinities matters
        if (visible) weights[n] = OF_FORMAT(score, k0, q, slot) + OF_FORMAT(score, k1, q + part.keys[0].width, slot);
        top = max(top, weights[n]);
    }
    top = simd_max(top);
    float total = 0.0f;
    for (uint n = 0; n < PER_LANE; n++) {
        weights[n] = weights[n] == -FLT_MAX ? 0.0f : exp(weights[n] - top);
        total += weights[n];
    }
    total = simd_sum(total);

    device float* out = partials + (ulong(row) * part.all_splits + part.first_split + split) * (2 + part.values.width);
    if (lane == 0) { out[0] = top; out[1] = total; }
    for (uint c = v.first; c < v.last; c++) {
        float sum = simd_sum(OF_FORMAT(weigh, v, weights, c, start));
        if (lane == 0) out[2 + c - v.first] = sum;
    }
}

// One thread for each channel of each query. A split that saw no token has total 0 and weighs nothing.
kernel void combine(device const float* partials,   // [B, H, T, splits, 2 + v]
                    device const float* null_score, // [B, H, T]
                    device const float* null_value, // [G, v]
                    device float* out,              // [B, H, T, v]
                    constant Result& result,
                    uint i [[thread_position_in_grid]]) {
    uint row = i / result.width, d = i % result.width, stride = 2 + result.width;
    uint g = row / result.tokens % result.heads / (result.heads / result.groups);
    partials += ulong(row) * result.splits * stride;
    float top = result.null ? null_score[row] : -FLT_MAX;
    for (uint s = 0; s < result.splits; s++) top = max(top, partials[s * stride]);
    float total = result.null ? exp(null_score[row] - top) : 0.0f;
    float sum = result.null ? total * null_value[g * result.width + d] : 0.0f;
    for (uint s = 0; s < result.splits; s++) {
        float weight = exp(partials[s * stride] - top);
        total += weight * partials[s * stride + 1];
        sum += weight * partials[s * stride + 2 + d];
    }
    out[i] = sum / total;
}
