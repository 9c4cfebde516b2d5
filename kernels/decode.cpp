// Decode attention over a quantised, channel-major cache, and what appends to it, on a CPU. cpu_decode.py compiles this
// file with any C++17 compiler and hands it numbers and addresses of 8 bytes each.
//
// Tokens are contiguous in memory, so every loop over the slots of a tile is one over vectors: a row of codes becomes
// floats once and meets all queries that share the key. Whole tiles are read; what holds no token is masked. A thread
// walks a split of a sequence and group by an online softmax; splits are merged at the end, with the null token.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __F16C__
#include <immintrin.h>
#endif

typedef float Vector __attribute__((vector_size(32)));              // GCC's and Clang's, on any CPU

constexpr int64_t LANES = sizeof(Vector) / sizeof(float);
constexpr int64_t TILE = 128;                       // slots at once; all that is allocated is a multiple of it
constexpr int64_t VECTORS = TILE / LANES;
constexpr int64_t ROWS = 8;                         // channels at once: so many sums stay in registers
constexpr int64_t BLOCK = 32;                       // channels that share a scale
constexpr int64_t SPLIT = 1024;                     // slots of the least work that a thread takes

enum Format : int64_t { FP32, BF16, FP16, Q8_0, Q4_0, Q4_SYM, NF4 };            // in the order of cpu_decode.FORMATS
constexpr float NF4_LEVELS[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// --- Numbers

inline float as_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline uint32_t as_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }

inline float from_half(uint16_t h) {
    float x = as_float(uint32_t(h & 0x7fff) << 13) * as_float(0x77800000);      // 2^112, also for subnormals
    x = (h & 0x7c00) == 0x7c00 ? as_float(uint32_t(h & 0x7fff) << 13 | 0x7f800000) : x;         // infinity and NaN
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
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;                      // ln 2 in two parts
    float y = 1.9875691500e-4f;                     // a minimax polynomial of degree 7 (Cephes, expf)
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
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

void read_halves(const uint16_t *from, float *x) {
#ifdef __F16C__
    for (int64_t s = 0; s < TILE; s += 8)
        _mm256_storeu_ps(x + s, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + s))));
#else
    for (int64_t s = 0; s < TILE; s++) x[s] = from_half(from[s]);
#endif
}

// The values of one channel of a stream in a tile of a sequence, from the settled tokens or the ring.
struct Reader {
    const Stream &stream;
    bool ring;
    int64_t b, start, block = -1;
    float scale[TILE];

    Reader(const Stream &of, bool ring, int64_t b, int64_t start) : stream(of), ring(ring), b(b), start(start) {}

    void read(int64_t channel, float *__restrict x) {
        Format format = ring ? stream.ring_format : stream.format;
        int64_t slots = ring ? stream.ring_slots : stream.slots;
        int64_t row = b * rows_of(format, stream.channels) + (format < Q4_0 ? channel : channel / 2);
        const uint8_t *from = (ring ? stream.ring : stream.codes) + (row * slots + start) * bytes_of(format);
        if (format == FP32) std::memcpy(x, from, TILE * 4);
        if (format == FP16) read_halves((const uint16_t *)from, x);
        if (format == BF16)
            for (int64_t s = 0; s < TILE; s++) x[s] = as_float(uint32_t(((const uint16_t *)from)[s]) << 16);
        if (format < Q8_0) return;
        if (channel / BLOCK != block) {
            block = channel / BLOCK;
            int64_t blocks = (stream.channels + BLOCK - 1) / BLOCK;
            read_halves(stream.scales + (b * blocks + block) * slots + start, scale);
        }
        int shift = channel % 2 * 4;
        if (format == Q8_0) {
            for (int64_t s = 0; s < TILE; s++) x[s] = float(int8_t(from[s])) * scale[s];
        } else if (format == NF4) {
            for (int64_t s = 0; s < TILE; s++) x[s] = NF4_LEVELS[from[s] >> shift & 15] * scale[s];
        } else {
            for (int64_t s = 0; s < TILE; s++) x[s] = float((from[s] >> shift & 15) - 8) * scale[s];
        }
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

// What some slots make of the M queries that share a key: largest score and sum of exponentials [M], and their weighted
// sum of values [M, v].
struct Partial {
    std::vector<float> top, total, sum;
    Partial(int64_t M, int64_t v) : top(M, -FLT_MAX), total(M, 0.0f), sum(M * v, 0.0f) {}
};

// Up to ROWS channels of a tile, read at once; zeros where no query of the sequence sees a token, which may be NaN.
struct Rows {
    Vector x[ROWS][VECTORS];

    void read(Reader &reader, int64_t first, int64_t count, const float *seen) {
        for (int64_t j = 0; j < ROWS; j++) {
            float *x = (float *)this->x[j];
            if (j < count) reader.read(first + j, x);
            else std::memset(x, 0, sizeof this->x[j]);
            if (seen) for (int64_t s = 0; s < TILE; s++) x[s] = seen[s] != 0 ? x[s] : 0.0f;
        }
    }
};

// The online softmax of one query over a tile: scores become weights. Returns what sums until now are multiplied by.
float weigh(float *__restrict score, float &top, float &total, bool all_visible, const int64_t *position, int64_t now) {
    float old_top = top, new_top = top, sum = 0.0f;
    if (!all_visible)
        for (int64_t s = 0; s < TILE; s++) score[s] = position[s] <= now ? score[s] : -INFINITY;
    #pragma omp simd reduction(max : new_top)
    for (int64_t s = 0; s < TILE; s++) new_top = score[s] > new_top ? score[s] : new_top;
    #pragma omp simd reduction(+ : sum)
    for (int64_t s = 0; s < TILE; s++) {
        score[s] = exponential(score[s] - new_top);
        sum += score[s];
    }
    float decay = std::exp(old_top - new_top);
    total = total * decay + sum;
    top = new_top;
    return decay;
}

void attend_slots(const Attention &a, int64_t b, int64_t g, bool ring, int64_t start, int64_t stop, Partial &into) {
    int64_t M = a.H / a.G * a.T, v = a.values.channels / a.G, w = 0;
    for (int64_t i = 0; i < a.paths; i++) w += a.keys[i].channels / a.G;
    const float *q = a.q + (b * a.G + g) * M * w;
    const int64_t *pos = a.pos + b * a.T, settled = a.settled[b], last = pos[a.T - 1];
    std::vector<Vector> scores(M * VECTORS), sums(M * v, Vector{});
    std::vector<float> decay(M);
    int64_t position[TILE];
    float held[TILE];
    Rows rows;

    for (; start < stop; start += TILE) {
        bool all_visible = !ring && start + TILE <= std::min(settled, pos[0] + 1);
        const float *seen = all_visible ? nullptr : held;
        for (int64_t s = 0; seen && s < TILE; s++) {
            int64_t slot = start + s;
            position[s] = ring ? settled + ((slot - settled) % a.window + a.window) % a.window : slot;
            if (slot >= (ring ? a.window : settled)) position[s] = INT64_MAX;
            held[s] = position[s] <= last;
        }

        std::fill(scores.begin(), scores.end(), Vector{});
        int64_t before = 0;
        for (int64_t i = 0; i < a.paths; i++) {
            int64_t width = a.keys[i].channels / a.G;
            Reader keys(a.keys[i], ring, b, start);
            for (int64_t c = 0; c < width; c += ROWS) {
                int64_t count = std::min(ROWS, width - c);
                rows.read(keys, g * width + c, count, seen);
                for (int64_t m = 0; m < M; m++) {
                    float query[ROWS] = {};
                    std::copy_n(q + m * w + before + c, count, query);
                    for (int64_t n = 0; n < VECTORS; n++) {
                        Vector score = scores[m * VECTORS + n];
                        for (int64_t j = 0; j < ROWS; j++) score += query[j] * rows.x[j][n];
                        scores[m * VECTORS + n] = score;
                    }
                }
            }
            before += width;
        }
        for (int64_t m = 0; m < M; m++) {
            float *score = (float *)&scores[m * VECTORS];
            decay[m] = weigh(score, into.top[m], into.total[m], all_visible, position, pos[m % a.T]);
        }

        Reader values(a.values, ring, b, start);
        for (int64_t c = 0; c < v; c += ROWS) {
            int64_t count = std::min(ROWS, v - c);
            rows.read(values, g * v + c, count, seen);
            for (int64_t m = 0; m < M; m++) {
                Vector sum[ROWS] = {};
                for (int64_t n = 0; n < VECTORS; n++) {
                    Vector weight = scores[m * VECTORS + n];
                    for (int64_t j = 0; j < ROWS; j++) sum[j] += weight * rows.x[j][n];
                }
                for (int64_t j = 0; j < count; j++) {
                    Vector &whole = sums[m * v + c + j];
                    whole = whole * decay[m] + sum[j];
                }
            }
        }
    }
    for (int64_t i = 0; i < M * v; i++)
        for (int64_t lane = 0; lane < LANES; lane++) into.sum[i] += sums[i][lane];
}

// out [v] of one query: the null token, score and value or null, and what the splits found, as softmax weighs them.
void combine(const std::vector<Partial> &partials, int64_t first, int64_t splits, int64_t m, int64_t v,
             const float *null_score, const float *null_value, float *out) {
    float top = null_score ? *null_score : -FLT_MAX, total = 0.0f;
    for (int64_t i = first; i < first + splits; i++) top = std::max(top, partials[i].top[m]);
    float null_weight = null_score ? std::exp(*null_score - top) : 0.0f;
    total = null_weight;
    for (int64_t c = 0; c < v; c++) out[c] = null_score ? null_weight * null_value[c] : 0.0f;
    for (int64_t i = first; i < first + splits; i++) {
        float weight = std::exp(partials[i].top[m] - top);
        total += weight * partials[i].total[m];
        for (int64_t c = 0; c < v; c++) out[c] += weight * partials[i].sum[m * v + c];
    }
    for (int64_t c = 0; c < v; c++) out[c] /= total;
}

extern "C" void attend(const Attention *call) {
    const Attention &a = *call;
    int64_t M = a.H / a.G * a.T, v = a.values.channels / a.G;
    int64_t settled_splits = (a.end + SPLIT - 1) / SPLIT, splits = settled_splits + (a.window + SPLIT - 1) / SPLIT;
    std::vector<Partial> partials(a.B * a.G * splits, Partial(M, v));
    int64_t threads = a.B * a.G * splits > 1 ? a.threads : 1;
    #pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < a.B * a.G * splits; i++) {
        int64_t split = i % splits, row = i / splits, b = row / a.G, last = a.pos[b * a.T + a.T - 1];
        bool ring = split >= settled_splits;
        int64_t start = (ring ? split - settled_splits : split) * SPLIT;
        int64_t held = ring ? a.window : std::min(a.settled[b], last + 1);
        attend_slots(a, b, row % a.G, ring, start, std::min(start + SPLIT, held), partials[i]);
    }
    for (int64_t i = 0; i < a.B * a.G * M; i++) {
        int64_t row = i / M;
        combine(partials, row * splits, splits, i % M, v, a.null_score ? a.null_score + i : nullptr,
                a.null_value + row % a.G * v, a.out + i * v);
    }
}

// --- Appending: quantize() of train_dba.py bit by bit

// Not inlined: a compiler that saw what is added to a product could fuse both, which rounds once: other codes.
__attribute__((noinline)) void scale_by(float inverse, float *x) {
    for (int64_t i = 0; i < BLOCK; i++) x[i] *= inverse;
}

// Codes, of 4 or 8 bits, of a block of 32 channels of a token, zeros after its last; x is used up. Returns the scale.
uint16_t quantize(Format format, float *x, uint8_t *codes) {
    float extreme = x[0];                           // the first of those with the largest size; a NaN beats all
    for (int64_t i = 1; i < BLOCK && extreme == extreme; i++)
        if (x[i] != x[i] || std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
    float largest = format == Q8_0 ? 127.0f : format == Q4_0 ? -8.0f : format == NF4 ? 1.0f : 7.0f;
    float d = (format == Q4_0 ? extreme : std::fabs(extreme)) / largest;
    bool fits = std::fabs(d) < 65520.0f;            // rounds to a finite half; false for a NaN
    float inverse = fits && std::fabs(d) > 0x1p-25f ? 1.0f / d : 0.0f;
    for (int64_t i = 0; i < BLOCK; i++) x[i] = fits ? x[i] : 0.0f;
    scale_by(inverse, x);
    for (int64_t i = 0; i < BLOCK; i++) {
        float u = x[i];
        if (format == Q8_0) {                       // halves away from zero
            float size = std::floor(std::fabs(u));
            size += std::fabs(u) - size >= 0.5f ? 1.0f : 0.0f;
            codes[i] = uint8_t(int8_t(u < 0 ? -size : size));
        } else if (format == NF4) {
            codes[i] = 0;
            for (int64_t n = 0; n < 15; n++) codes[i] += u > (NF4_LEVELS[n] + NF4_LEVELS[n + 1]) / 2;
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
            int64_t scale = (a.rows[i] * blocks + block) * s.slots + a.pos[i];
            ((uint16_t *)s.scales)[scale] = quantize(s.format, padded, codes);
            for (int64_t c = 0; c < channels; c += step, at += s.slots) {       // the even channel in the low half
                uint8_t high = c + 1 < channels ? codes[c + 1] : 0;
                ((uint8_t *)s.codes)[at] = step == 1 ? codes[c] : codes[c] | high << 4;
            }
        }
    }
}
