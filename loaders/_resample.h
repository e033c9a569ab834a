/* Resizing of packed RGB rows as they come, with the bits of Pillow's Image.resize(size, filter, box).
 *
 * Two passes, as in Pillow: each source row is resampled horizontally and rounded to 8 bits at once, while it is in the
 * cache, into a ring of as many rows as an output row is made of; each output row is made when its last row is there.
 * Both passes exist in portable C and for AVX2, with the same results: sums of integers are exact in any order.
 *
 *     if (resizer_init(&resizer, ...) == 0)
 *         for (int y = resizer.down.begin; y < resizer.down.end; y++)
 *             resizer_push(&resizer, row y from column resizer.across.begin, out);
 *     resizer_free(&resizer);
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(PORTABLE_KERNELS)
#define HAVE_AVX2_KERNELS
#include <immintrin.h>
#endif

#define CHANNELS 3

/* Weights are fixed-point with Pillow's precision: of 32 bits, 8 are the pixel's and 2 for sums that leave 0..255. */
#define WEIGHT_BITS (32 - 8 - 2)
#define HALF (1 << (WEIGHT_BITS - 1))

/* The AVX2 kernels read and write whole vectors: bytes that rows of the ring have beyond their end. */
#define BLOCK 8 /* output pixels at a time */
#define ROW_SLACK 32

typedef struct {
    const char *name;
    double support; /* half the filter's width, in source pixels when enlarging */
    double (*at)(double distance);
} Filter;

static double bilinear_at(double x)
{
    x = fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

static double bicubic_at(double x) /* Keys' cubic convolution with a = -0.5 */
{
    const double a = -0.5;
    x = fabs(x);
    if (x < 1.0)
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    return x < 2.0 ? (((x - 5) * x + 8) * x - 4) * a : 0.0;
}

static const Filter FILTERS[] = {{"bilinear", 1.0, bilinear_at}, {"bicubic", 2.0, bicubic_at}};

/* How the pixels of one axis of the output are made: output i is the sum over t of weights[i * taps + t] times source pixel
 * begin + first[i] + t.  All have as many taps as the widest needs, and an even number; the weights beyond last[i] are 0.
 * The arrays are zero up to a multiple of BLOCK. */
typedef struct {
    int size, taps;
    int begin, end; /* the source pixels that are needed at all */
    int *first, *last;
    int32_t *weights;
} Axis;

typedef void RowKernel(const Axis *axis, const int16_t *packed, const uint8_t *pixels, uint8_t *out);
typedef void BlendKernel(const uint8_t *const *rows, const int32_t *weights, int count, uint8_t *out, size_t size);

typedef struct {
    Axis across, down;
    int16_t *packed; /* the horizontal weights as the AVX2 kernel takes them */
    uint8_t *ring;
    const uint8_t **blended; /* the rows of the ring that make one output row */
    int rows_in, rows_out;
    RowKernel *resample_row;
    BlendKernel *blend_rows;
} Resizer;

/* ---- Plans ---- */

/* Plan an axis whose output is the box from `begin` to `end` of `source` pixels.  The formula is Pillow's (Resample.c,
 * precompute_coeffs), and so are types and order of operations: any other rounding would show in the last bit. */
static int plan_axis(Axis *axis, const Filter *filter, int source, float begin, float end, int size, int mirrored)
{
    double scale = (double)(end - begin) / size;
    double stretch = scale < 1.0 ? 1.0 : scale;
    double support = filter->support * stretch;
    size_t padded = (size_t)(size + BLOCK - 1) / BLOCK * BLOCK;
    int widest = 0;
    axis->size = size;
    axis->first = calloc(padded, sizeof *axis->first);
    axis->last = calloc(padded, sizeof *axis->last);
    if (axis->first == NULL || axis->last == NULL)
        return -1;
    for (int i = 0; i < size; i++) {
        double center = begin + (i + 0.5) * scale;
        int first = (int)(center - support + 0.5), last = (int)(center + support + 0.5);
        int slot = mirrored ? size - 1 - i : i;
        axis->first[slot] = first < 0 ? 0 : first;
        axis->last[slot] = last > source ? source : last;
        if (axis->last[slot] - axis->first[slot] > widest)
            widest = axis->last[slot] - axis->first[slot];
    }
    axis->taps = widest + widest % 2;
    axis->weights = calloc(padded * axis->taps, sizeof *axis->weights);
    if (axis->weights == NULL)
        return -1;
    axis->begin = axis->first[mirrored ? size - 1 : 0];
    axis->end = axis->last[mirrored ? 0 : size - 1];
    for (int i = 0; i < size; i++) {
        double center = begin + (i + 0.5) * scale, total = 0.0;
        int slot = mirrored ? size - 1 - i : i;
        int first = axis->first[slot], count = axis->last[slot] - first;
        int32_t *weights = axis->weights + (size_t)slot * axis->taps;
        for (int t = 0; t < count; t++)
            total += filter->at((t + first - center + 0.5) * (1.0 / stretch));
        for (int t = 0; t < count; t++) {
            double weight = filter->at((t + first - center + 0.5) * (1.0 / stretch));
            if (total != 0.0)
                weight /= total;
            weights[t] = (int32_t)((weight < 0 ? -0.5 : 0.5) + weight * (1 << WEIGHT_BITS));
        }
        axis->first[slot] -= axis->begin;
        axis->last[slot] -= axis->begin;
    }
    return 0;
}

/* ---- Portable kernels ---- */

static inline uint8_t clip(int32_t sum)
{
    int32_t value = sum >> WEIGHT_BITS;
    return value < 0 ? 0 : value > 255 ? 255 : value;
}

static void resample_row(const Axis *axis, const int16_t *packed, const uint8_t *pixels, uint8_t *out)
{
    (void)packed;
    for (int i = 0; i < axis->size; i++, out += CHANNELS) {
        const uint8_t *pixel = pixels + (size_t)axis->first[i] * CHANNELS;
        const int32_t *weights = axis->weights + (size_t)i * axis->taps;
        int32_t red = HALF, green = HALF, blue = HALF;
        for (int t = 0; t < axis->last[i] - axis->first[i]; t++, pixel += CHANNELS) {
            red += weights[t] * pixel[0];
            green += weights[t] * pixel[1];
            blue += weights[t] * pixel[2];
        }
        out[0] = clip(red);
        out[1] = clip(green);
        out[2] = clip(blue);
    }
}

/* Make one output row of `size` bytes from `count` rows. */
static void blend_rows(const uint8_t *const *rows, const int32_t *weights, int count, uint8_t *out, size_t size)
{
    enum { CHUNK = 256 };
    int32_t sums[CHUNK];
    for (size_t start = 0; start < size; start += CHUNK) {
        size_t length = size - start < CHUNK ? size - start : CHUNK;
        for (size_t i = 0; i < length; i++)
            sums[i] = HALF;
        for (int t = 0; t < count; t++)
            for (size_t i = 0; i < length; i++)
                sums[i] += weights[t] * rows[t][start + i];
        for (size_t i = 0; i < length; i++)
            out[start + i] = clip(sums[i]);
    }
}

/* ---- AVX2 kernels ---- */

#ifdef HAVE_AVX2_KERNELS
#define AVX2 __attribute__((target("avx2")))

/* The horizontal kernel multiplies 16-bit numbers in pairs (vpmaddwd), so each weight is split in two: weight = (high <<
 * LOW_BITS) + low.  A vector of weights serves one pair of taps of two output pixels, number v of a block in its lower half
 * and v + 4 in its upper half.  The vectors' order: block, v, pair of taps, high and low. */
#define LOW_BITS 11
#define LANES 16

static int16_t *pack_weights(const Axis *axis)
{
    int pairs = axis->taps / 2, padded = (axis->size + BLOCK - 1) / BLOCK * BLOCK;
    int16_t *packed = malloc((size_t)padded * pairs * LANES * sizeof *packed);
    if (packed == NULL)
        return NULL;
    for (int i = 0; i < padded; i++)
        for (int p = 0; p < pairs; p++) {
            const int32_t *pair = axis->weights + (size_t)i * axis->taps + 2 * p;
            size_t vector = ((size_t)(i / BLOCK * 4 + i % 4) * pairs + p) * 2;
            int16_t *high = packed + vector * LANES + i % BLOCK / 4 * (LANES / 2), *low = high + LANES;
            for (int t = 0; t < LANES / 2; t++) {
                high[t] = (int16_t)(pair[t % 2] >> LOW_BITS);
                low[t] = (int16_t)(pair[t % 2] & ((1 << LOW_BITS) - 1));
            }
        }
    return packed;
}

static inline AVX2 __m256i load_two(const uint8_t *lower, const uint8_t *upper)
{
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)lower)),
                                   _mm_loadu_si128((const __m128i *)upper), 1);
}

/* Narrow 4 vectors of 8 sums to bytes.  The order is that of packing within halves: 4 of each in turn, lower halves first. */
static inline AVX2 __m256i narrow(const __m256i sums[4])
{
    return _mm256_packus_epi16(
        _mm256_packs_epi32(_mm256_srai_epi32(sums[0], WEIGHT_BITS), _mm256_srai_epi32(sums[1], WEIGHT_BITS)),
        _mm256_packs_epi32(_mm256_srai_epi32(sums[2], WEIGHT_BITS), _mm256_srai_epi32(sums[3], WEIGHT_BITS)));
}

/* Inlined for each small number of pairs, so that the loops over them unroll. */
static inline AVX2 __attribute__((always_inline)) void resample_row_pairs(const Axis *axis, int pairs, const int16_t *packed,
                                                                          const uint8_t *pixels, uint8_t *out)
{
    /* Two neighbouring pixels of 3 bytes become pairs of 16-bit numbers: red, red, green, green, blue, blue, 0, 0.  One load
     * of 16 bytes serves two pairs. */
    const __m256i pair_channels[2] = {
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1)),
        _mm256_broadcastsi128_si256(_mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1)),
    };
    const __m256i drop_fourth = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    const __m256i *weights = (const __m256i *)packed;
    for (int i = 0; i < axis->size; i += BLOCK, out += BLOCK * CHANNELS) {
        __m256i sums[4];
        for (int v = 0; v < 4; v++) {
            const uint8_t *lower = pixels + (size_t)axis->first[i + v] * CHANNELS;
            const uint8_t *upper = pixels + (size_t)axis->first[i + v + 4] * CHANNELS;
            __m256i high = _mm256_setzero_si256(), low = _mm256_set1_epi32(HALF), four = high;
            for (int p = 0; p < pairs; p++) {
                if (p % 2 == 0)
                    four = load_two(lower + 2 * CHANNELS * p, upper + 2 * CHANNELS * p);
                __m256i pair = _mm256_shuffle_epi8(four, pair_channels[p % 2]);
                high = _mm256_add_epi32(high, _mm256_madd_epi16(pair, _mm256_loadu_si256(weights++)));
                low = _mm256_add_epi32(low, _mm256_madd_epi16(pair, _mm256_loadu_si256(weights++)));
            }
            sums[v] = _mm256_add_epi32(_mm256_slli_epi32(high, LOW_BITS), low);
        }
        __m256i bytes = _mm256_shuffle_epi8(narrow(sums), drop_fourth);
        _mm_storeu_si128((__m128i *)out, _mm256_castsi256_si128(bytes));
        _mm_storeu_si128((__m128i *)(out + 4 * CHANNELS), _mm256_extracti128_si256(bytes, 1));
    }
}

static AVX2 void resample_row_avx2(const Axis *axis, const int16_t *packed, const uint8_t *pixels, uint8_t *out)
{
    switch (axis->taps / 2) {
    case 1:
        resample_row_pairs(axis, 1, packed, pixels, out);
        break;
    case 2:
        resample_row_pairs(axis, 2, packed, pixels, out);
        break;
    case 3:
        resample_row_pairs(axis, 3, packed, pixels, out);
        break;
    default:
        resample_row_pairs(axis, axis->taps / 2, packed, pixels, out);
    }
}

static AVX2 void blend_rows_avx2(const uint8_t *const *rows, const int32_t *weights, int count, uint8_t *out, size_t size)
{
    enum { CHUNK = 32 };
    for (size_t start = 0; start < size; start += CHUNK) {
        __m256i sums[4];
        for (int v = 0; v < 4; v++)
            sums[v] = _mm256_set1_epi32(HALF);
        for (int t = 0; t < count; t++) {
            __m256i weight = _mm256_set1_epi32(weights[t]);
            for (int v = 0; v < 4; v++) {
                __m256i pixels = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(rows[t] + start + 8 * v)));
                sums[v] = _mm256_add_epi32(sums[v], _mm256_mullo_epi32(pixels, weight));
            }
        }
        __m256i bytes = _mm256_permutevar8x32_epi32(narrow(sums), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        if (size - start >= CHUNK) {
            _mm256_storeu_si256((__m256i *)(out + start), bytes);
        } else {
            uint8_t rest[CHUNK];
            _mm256_storeu_si256((__m256i *)rest, bytes);
            memcpy(out + start, rest, size - start);
        }
    }
}
#endif

/* ---- The resizer ---- */

/* Plan the resize of the box (x0, y0, x1, y1) of a source of that size; 0, or -1 without memory.  Free it in either case. */
static int resizer_init(Resizer *resizer, const Filter *filter, int source_width, int source_height, const float box[4],
                        int out_width, int out_height, int mirrored)
{
    memset(resizer, 0, sizeof *resizer);
    if (plan_axis(&resizer->across, filter, source_width, box[0], box[2], out_width, mirrored) < 0 ||
        plan_axis(&resizer->down, filter, source_height, box[1], box[3], out_height, 0) < 0)
        return -1;
    resizer->resample_row = resample_row;
    resizer->blend_rows = blend_rows;
#ifdef HAVE_AVX2_KERNELS
    if (__builtin_cpu_supports("avx2")) {
        resizer->resample_row = resample_row_avx2;
        resizer->blend_rows = blend_rows_avx2;
        resizer->packed = pack_weights(&resizer->across);
        if (resizer->packed == NULL)
            return -1;
    }
#endif
    resizer->ring = calloc(resizer->down.taps, (size_t)out_width * CHANNELS + ROW_SLACK);
    resizer->blended = calloc(resizer->down.taps, sizeof *resizer->blended);
    return resizer->ring == NULL || resizer->blended == NULL ? -1 : 0;
}

/* Bytes that must be readable beyond the last needed pixel of each row that is pushed. */
static size_t resizer_slack(const Resizer *resizer)
{
    return (size_t)resizer->across.taps * CHANNELS + 16;
}

/* Take the next of the needed rows, from its first needed pixel, and write those rows of `out` that it completes. */
static void resizer_push(Resizer *resizer, const uint8_t *pixels, uint8_t *out)
{
    const Axis *down = &resizer->down;
    size_t row_size = (size_t)resizer->across.size * CHANNELS, stride = row_size + ROW_SLACK;
    resizer->resample_row(&resizer->across, resizer->packed, pixels, resizer->ring + resizer->rows_in % down->taps * stride);
    resizer->rows_in++;
    for (int y = resizer->rows_out; y < down->size && down->last[y] == resizer->rows_in; y++) {
        int count = down->last[y] - down->first[y];
        for (int t = 0; t < count; t++)
            resizer->blended[t] = resizer->ring + (down->first[y] + t) % down->taps * stride;
        resizer->blend_rows(resizer->blended, down->weights + (size_t)y * down->taps, count, out + y * row_size, row_size);
        resizer->rows_out++;
    }
}

static void axis_free(Axis *axis)
{
    free(axis->first);
    free(axis->last);
    free(axis->weights);
}

static void resizer_free(Resizer *resizer)
{
    axis_free(&resizer->across);
    axis_free(&resizer->down);
    free(resizer->packed);
    free(resizer->ring);
    free(resizer->blended);
}
