// Decode attention over a quantised, channel-major cache, and what appends to it, on a CPU. cpu_decode.py compiles this
// file with any C++17 compiler and hands it numbers and addresses of 8 bytes each.
//
// Tokens are contiguous in memory, so every loop over the slots of a tile is one that compilers vectorise: a row of
// codes becomes floats once and meets all queries that share the key. A tile of a sequence and group is attended to by
// an online softmax; what its neighbours found is merged at the end, with the null token.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __F16C__
#include <immintrin.h>
#endif

constexpr int64_t TILE = 256;                       // slots at once: a row of floats and the scores stay in the L1 cache
constexpr int64_t BLOCK = 32;                       // channels that share a scale
constexpr int64_t SPLIT = 1024;                     // slots of the least work that a thread takes
constexpr int64_t MOST_QUERIES = 64;                // that share a key

enum Format : int64_t { FP32, BF16, FP16, Q8_0, Q4_0, Q4_SYM, NF4 };            // in the order of cpu_decode.FORMATS
constexpr float NF4_LEVELS[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// --- Numbers

inline float as_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline uint32_t as_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }

inline float multiply_add(float a, float b, float c) {              // the compiler may not fuse them by itself, see below
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

inline float from_half(uint16_t h) {
    float x = as_float(uint32_t(h & 0x7fff) << 13) * as_float(0x77800000);      // 2^112: moves the exponent, and
    x = (h & 0x7c00) == 0x7c00 ? as_float(uint32_t(h & 0x7fff) << 13 | 0x7f800000) : x;         // makes subnormals normal
    return as_float(as_bits(x) | uint32_t(h & 0x8000) << 16);
}

inline uint16_t to_half(float x) {                  // rounds to the nearest, to even if tied
    uint32_t bits = as_bits(x) & 0x7fffffff, sign = as_bits(x) >> 16 & 0x8000;
    if (bits > 0x7f800000) return sign | 0x7e00;    // NaN
    if (bits >= 0x477ff000) return sign | 0x7c00;   // 65520 and above
    if (bits < 0x38800000) return sign | (as_bits(as_float(bits) + 0.5f) - 0x3f000000);         // subnormal
    return sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
}

inline uint16_t to_bfloat16(float x) {
    uint32_t bits = as_bits(x);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float exponential(float x) {                 // of x <= 0, to 2 units in the last place; 0 below -87; NaN of NaN
    float n = std::floor(x * 1.44269504f + 0.5f);
    float r = multiply_add(n, -0.693359375f, x);    // ln 2 in two parts
    r = multiply_add(n, 2.12194440e-4f, r);
    float y = 1.9875691500e-4f;                     // a minimax polynomial of degree 7 (Cephes, expf)
    y = multiply_add(y, r, 1.3981999507e-3f);
    y = multiply_add(y, r, 8.3334519073e-3f);
    y = multiply_add(y, r, 4.1665795894e-2f);
    y = multiply_add(y, r, 1.6666665459e-1f);
    y = multiply_add(y, r, 5.0000001201e-1f);
    y = multiply_add(y, r * r, r) + 1.0f;
    n = n < -126.0f ? -126.0f : n;
    y *= as_float(uint32_t(int32_t(n) + 127) << 23);
    return x < -87.0f ? 0.0f : y;
}

// --- Reading the cache

struct Stream {                                     // as cpu_decode.describe() packs it
    Format format, ring_format;
    int64_t channels, slots, ring_slots;            // slots are those that are allocated
    const uint8_t *codes;                           // [B, rows, slots]
    const uint16_t *scales;                         // [B, blocks, slots], or null
    const uint8_t *ring;                            // [B, channels, ring_slots]
};

inline int64_t bytes_of(Format format) { return format == FP32 ? 4 : format < Q8_0 ? 2 : 1; }
inline int64_t rows_of(Format format, int64_t channels) { return format < Q4_0 ? channels : (channels + 1) / 2; }

void read_halves(const uint16_t *from, int64_t n, float *x) {
    int64_t s = 0;
#ifdef __F16C__
    for (; s + 8 <= n; s += 8) _mm256_storeu_ps(x + s, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + s))));
#endif
    for (; s < n; s++) x[s] = from_half(from[s]);
}

// The values of one channel in n slots of a sequence, from one part of the cache.
struct Reader {
    const Stream &stream;
    bool ring;
    int64_t b, start, n;
    int64_t block = -1;
    float scale[TILE];

    Reader(const Stream &s, bool ring, int64_t b, int64_t start, int64_t n)
        : stream(s), ring(ring), b(b), start(start), n(n) {}

    void read(int64_t channel, float *x) {
        Format format = ring ? stream.ring_format : stream.format;
        int64_t slots = ring ? stream.ring_slots : stream.slots;
        int64_t row = b * rows_of(format, stream.channels) + (format < Q4_0 ? channel : channel / 2);
        const uint8_t *from = (ring ? stream.ring : stream.codes) + (row * slots + start) * bytes_of(format);
        if (format == FP32) std::memcpy(x, from, n * 4);
        if (format == FP16) read_halves((const uint16_t *)from, n, x);
        if (format == BF16) for (int64_t s = 0; s < n; s++) x[s] = as_float(uint32_t(((const uint16_t *)from)[s]) << 16);
        if (format < Q8_0) return;
        if (channel / BLOCK != block) {
            block = channel / BLOCK;
            int64_t blocks = (stream.channels + BLOCK - 1) / BLOCK;
            read_halves(stream.scales + (b * blocks + block) * slots + start, n, scale);
        }
        int shift = channel % 2 * 4;
        if (format == Q8_0) for (int64_t s = 0; s < n; s++) x[s] = float(int8_t(from[s])) * scale[s];
        else if (format == NF4) for (int64_t s = 0; s < n; s++) x[s] = NF4_LEVELS[from[s] >> shift & 15] * scale[s];
        else for (int64_t s = 0; s < n; s++) x[s] = float((from[s] >> shift & 15) - 8) * scale[s];
    }
};

// --- Attention

struct Attention {                                  // as cpu_decode.attention() packs it
    int64_t B, H, G, T, end, window, paths, threads;
    const int64_t *pos, *settled;                   // [B, T], [B]
    const float *q, *null_score, *null_value;       // [B, H, T, w], [B, H, T] or null, [G, v]
    float *out;                                     // [B, H, T, v]
    Stream values, keys[2];
};

// What some slots make of the queries that share a key: largest score and sum of exponentials [M], their weighted sum
// of values [M, v].
struct Partial {
    std::vector<float> top, total, sum;
    Partial(int64_t M, int64_t v) : top(M, -FLT_MAX), total(M, 0.0f), sum(M * v, 0.0f) {}

    void merge(int64_t m, int64_t v, float other_top, float other_total, const float *other_sum) {
        float new_top = std::max(top[m], other_top), old = std::exp(top[m] - new_top);
        float weight = std::exp(other_top - new_top);
        total[m] = total[m] * old + other_total * weight;
        for (int64_t c = 0; c < v; c++) sum[m * v + c] = sum[m * v + c] * old + (weight > 0 ? other_sum[c] * weight : 0);
        top[m] = new_top;
    }
};

void attend_slots(const Attention &a, int64_t b, int64_t g, bool ring, int64_t start, int64_t stop, Partial &into) {
    int64_t M = a.H / a.G * a.T, v = a.values.channels / a.G, w = 0;
    for (int64_t i = 0; i < a.paths; i++) w += a.keys[i].channels / a.G;
    const float *q = a.q + (b * a.G + g) * M * w;
    const int64_t *pos = a.pos + b * a.T, settled = a.settled[b], last = pos[a.T - 1];
    static thread_local std::vector<float> scores;
    scores.resize(M * TILE);
    float x[TILE];
    int64_t position[TILE];

    for (; start < stop; start += TILE) {
        int64_t n = std::min(TILE, stop - start);
        bool all_hold_tokens = true;
        for (int64_t s = 0; s < n; s++) {
            int64_t slot = start + s;
            position[s] = ring ? settled + ((slot - settled) % a.window + a.window) % a.window : slot;
            if (!ring && slot >= settled) position[s] = INT64_MAX;
            all_hold_tokens &= position[s] <= last;
        }
        auto read = [&](Reader &reader, int64_t channel) {
            reader.read(channel, x);
            if (!all_hold_tokens)                   // there may be a NaN where there is no token
                for (int64_t s = 0; s < n; s++) x[s] = position[s] <= last ? x[s] : 0.0f;
        };

        std::fill(scores.begin(), scores.end(), 0.0f);
        int64_t before = 0;
        for (int64_t i = 0; i < a.paths; i++) {
            int64_t width = a.keys[i].channels / a.G;
            Reader keys(a.keys[i], ring, b, start, n);
            for (int64_t c = 0; c < width; c++) {
                read(keys, g * width + c);
                for (int64_t m = 0; m < M; m++) {
                    float *score = &scores[m * TILE], query = q[m * w + before + c];
                    for (int64_t s = 0; s < n; s++) score[s] = multiply_add(query, x[s], score[s]);
                }
            }
            before += width;
        }

        float old[MOST_QUERIES];
        for (int64_t m = 0; m < M; m++) {
            float *score = &scores[m * TILE], top = into.top[m], total = 0.0f;
            int64_t now = pos[m % a.T];
            if (now < last || !all_hold_tokens)
                for (int64_t s = 0; s < n; s++) score[s] = position[s] <= now ? score[s] : -INFINITY;
            #pragma omp simd reduction(max : top)
            for (int64_t s = 0; s < n; s++) top = score[s] > top ? score[s] : top;
            #pragma omp simd reduction(+ : total)
            for (int64_t s = 0; s < n; s++) {
                score[s] = exponential(score[s] - top);
                total += score[s];
            }
            old[m] = std::exp(into.top[m] - top);
            into.total[m] = into.total[m] * old[m] + total;
            into.top[m] = top;
        }

        Reader values(a.values, ring, b, start, n);
        for (int64_t c = 0; c < v; c++) {
            read(values, g * v + c);
            for (int64_t m = 0; m < M; m++) {
                const float *weight = &scores[m * TILE];
                float sum = 0.0f;
                #pragma omp simd reduction(+ : sum)
                for (int64_t s = 0; s < n; s++) sum = multiply_add(weight[s], x[s], sum);
                into.sum[m * v + c] = into.sum[m * v + c] * old[m] + sum;
            }
        }
    }
}

extern "C" void attend(const Attention *call) {
    const Attention &a = *call;
    int64_t M = a.H / a.G * a.T, v = a.values.channels / a.G;
    int64_t settled_units = (a.end + SPLIT - 1) / SPLIT, units = settled_units + (a.window + SPLIT - 1) / SPLIT;
    std::vector<Partial> partials(a.B * a.G * units, Partial(M, v));
    #pragma omp parallel for schedule(dynamic) num_threads(a.threads) if (a.threads > 1)
    for (int64_t i = 0; i < a.B * a.G * units; i++) {
        int64_t unit = i % units, row = i / units, b = row / a.G, last = a.pos[b * a.T + a.T - 1];
        bool ring = unit >= settled_units;
        int64_t start = (ring ? unit - settled_units : unit) * SPLIT;
        int64_t held = ring ? a.window : std::min({a.end, a.settled[b], last + 1});
        attend_slots(a, b, row % a.G, ring, start, std::min(start + SPLIT, held), partials[i]);
    }
    for (int64_t row = 0; row < a.B * a.G; row++) {
        Partial whole(M, v);
        for (int64_t m = 0; m < M; m++) {
            if (a.null_score) whole.merge(m, v, a.null_score[row * M + m], 1.0f, a.null_value + row % a.G * v);
            for (int64_t unit = 0; unit < units; unit++) {
                Partial &part = partials[row * units + unit];
                whole.merge(m, v, part.top[m], part.total[m], &part.sum[m * v]);
            }
            for (int64_t c = 0; c < v; c++) a.out[(row * M + m) * v + c] = whole.sum[m * v + c] / whole.total[m];
        }
    }
}

// --- Appending: quantize() of train_dba.py bit by bit, which is why this file is compiled with -ffp-contract=off: a
// multiply-add that rounds once gives other codes.

// One block of 32 channels of a token, zeros after its last: 32 codes, of 4 or 8 bits. Returns the scale.
uint16_t quantize(Format format, const float *x, uint8_t *codes) {
    float extreme = x[0];                           // the first of those with the largest size; a NaN is larger than all
    for (int64_t i = 1; i < BLOCK && extreme == extreme; i++)
        if (x[i] != x[i] || std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
    float d = format == Q4_0 ? extreme / -8.0f : std::fabs(extreme) / (format == Q8_0 ? 127.0f : format == NF4 ? 1.0f : 7.0f);
    bool fits = std::fabs(d) < 65520.0f;            // rounds to a finite half; false for a NaN
    float inverse = fits && std::fabs(d) > 0x1p-25f ? 1.0f / d : 0.0f;
    for (int64_t i = 0; i < BLOCK; i++) {
        float u = (fits ? x[i] : 0.0f) * inverse;
        if (format == Q8_0) {                       // halves away from zero
            float size = std::floor(std::fabs(u));
            size += std::fabs(u) - size >= 0.5f ? 1.0f : 0.0f;
            codes[i] = uint8_t(int8_t(u < 0 ? -size : size));
        } else if (format == NF4) {
            codes[i] = 0;
            for (int64_t level = 0; level < 15; level++) codes[i] += u > (NF4_LEVELS[level] + NF4_LEVELS[level + 1]) / 2;
        } else {
            codes[i] = uint8_t(std::min(std::max(std::floor(u + 8.5f), 0.0f), 15.0f));
        }
    }
    return fits ? to_half(d) : 0x7e00;
}

struct Append {                                     // as cpu_decode.append() packs it
    int64_t tokens, threads;
    const int64_t *rows, *pos;                      // [N] each
    const float *x;                                 // [N, channels]
    Stream stream;
};

extern "C" void append(const Append *call) {
    const Append &a = *call;
    const Stream &s = a.stream;
    int64_t C = s.channels, blocks = (C + BLOCK - 1) / BLOCK, rows = rows_of(s.format, C);
    #pragma omp parallel for num_threads(a.threads) if (a.threads > 1 && a.tokens > 64)
    for (int64_t i = 0; i < a.tokens; i++) {
        const float *x = a.x + i * C;
        int64_t at = a.rows[i] * rows * s.slots + a.pos[i];                     // of the first channel
        if (s.format < Q8_0) {
            for (int64_t c = 0; c < C; c++, at += s.slots) {
                if (s.format == FP32) ((float *)s.codes)[at] = x[c];
                else ((uint16_t *)s.codes)[at] = s.format == FP16 ? to_half(x[c]) : to_bfloat16(x[c]);
            }
            continue;
        }
        for (int64_t block = 0; block < blocks; block++) {
            int64_t channels = std::min(BLOCK, C - block * BLOCK), step = s.format == Q8_0 ? 1 : 2;
            float padded[BLOCK] = {};
            uint8_t codes[BLOCK];
            std::copy(x + block * BLOCK, x + block * BLOCK + channels, padded);
            ((uint16_t *)s.scales)[(a.rows[i] * blocks + block) * s.slots + a.pos[i]] = quantize(s.format, padded, codes);
            for (int64_t c = 0; c < channels; c += step, at += s.slots) {       // the even channel in the low half
                uint8_t high = c + 1 < channels ? codes[c + 1] : 0;
                ((uint8_t *)s.codes)[at] = step == 1 ? codes[c] : codes[c] | high << 4;
            }
        }
    }
}
