/* Loss and gradient of toy models x -> ReLU(W^T W x + b) for samples of 0 and 1: the same numbers as toy.Models._group, in one pass.
 *
 * A block of samples stays in the first-level cache from its hidden units to its part of the gradient, and products with a sample visit only
 * the features that are on. Vectors are those of GCC and Clang, so this compiles for any processor; toy_step.py compiles it and checks it.
 *
 * theta, grad (instances, configs, rows, width): W, rows of zeros, and last the bias; rows is a multiple of 4, width one of 16.
 * x (sets, n, width) bytes; shares (instances, n), or null where every sample counts 1 / n; weight (width). losses (instances, configs).
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define BLOCK 32 /* samples worked on at once: a multiple of 4 */
#define UNITS(configs, rows) (((configs) * (rows) + LANES - 1) / LANES * LANES) /* hidden units of several models, one after the other */
#define SCRATCH(units, width) (2 * ((units) * (width) + BLOCK * ((units) + (width))) * sizeof(float))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t mask __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));
#define BYTE(word) (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? __builtin_ctzll(word) >> 3 : 7 - (__builtin_ctzll(word) >> 3))

typedef struct { /* the features that are on in sample s: index[begin[s]] up to, not including, index[begin[s + 1]] */
    int64_t *begin;
    int32_t *index;
} lists;

static inline vec *at(const float *p) { return (vec *)p; }

static inline vec keep(vec values, mask where) { return (vec)((mask)values & where); }

/* The sums of four vectors */
static inline quad sums(vec a, vec b, vec c, vec d) {
    vec ab = __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
           + __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    vec cd = __builtin_shufflevector(c, d, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
           + __builtin_shufflevector(c, d, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    vec all = __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
            + __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    quad q[4];
    memcpy(q, &all, sizeof all);
    return (q[0] + q[1]) + (q[2] + q[3]);
}

static void find(const uint8_t *x, long n, long width, lists on) {
    int64_t count = 0;
    for (long s = 0; s < n; s++) {
        on.begin[s] = count;
        for (long f = 0; f < width; f += 8) {
            uint64_t word;
            memcpy(&word, x + s * width + f, 8);
            for (; word; word &= word - 1) on.index[count++] = (int32_t)(f + BYTE(word));
        }
    }
    on.begin[n] = count;
}

/* out[s] = ReLU(sum_k h[s][k] w[k]) for four samples and `wide` vectors of features */
static inline __attribute__((always_inline)) void outputs(
    const float *h, long units, const float *w, float *out, long rows, long width, const int wide) {
    vec acc[4][4] = {0};
    for (long k = 0; k < rows; k++)
        for (int s = 0; s < 4; s++)
            for (int v = 0; v < wide; v++) acc[s][v] += h[s * units + k] * *at(w + k * width + v * LANES);
    for (int s = 0; s < 4; s++)
        for (int v = 0; v < wide; v++) *at(out + s * width + v * LANES) = keep(acc[s][v], ~(acc[s][v] < 0)); /* NaN stays NaN */
}

/* Weighted squared error of a sample; its outputs become the gradient with respect to what goes into the ReLU, times `scale`. */
static inline vec slopes(float *out, const float *x, const float *weight, float scale, long width) {
    vec loss = {0};
    for (long f = 0; f < width; f += LANES) {
        vec error = *at(out + f) - *at(x + f), weighted = error * *at(weight + f);
        loss += error * weighted;
        *at(out + f) = keep(weighted * scale, ~(*at(out + f) == 0)); /* the ReLU is flat where it gives 0 */
    }
    return loss;
}

/* back[s][k] = slope[s] . w[k] for four samples and four rows */
static inline void inner(const float *slope, const float *w, float *back, long units, long width) {
    vec acc[4][4] = {0};
    for (long f = 0; f < width; f += LANES)
        for (int s = 0; s < 4; s++)
            for (int k = 0; k < 4; k++) acc[s][k] += *at(slope + s * width + f) * *at(w + k * width + f);
    for (int s = 0; s < 4; s++) *(quad *)(back + s * units) = sums(acc[s][0], acc[s][1], acc[s][2], acc[s][3]);
}

/* grad[k] += sum_s h[s][k] slope[s] for four rows and `wide` vectors of features */
static inline __attribute__((always_inline)) void outer(
    const float *h, long units, const float *slope, float *grad, long count, long width, const int wide) {
    vec acc[4][4];
    for (int k = 0; k < 4; k++)
        for (int v = 0; v < wide; v++) acc[k][v] = *at(grad + k * width + v * LANES);
    for (long s = 0; s < count; s++)
        for (int k = 0; k < 4; k++)
            for (int v = 0; v < wide; v++) acc[k][v] += h[s * units + k] * *at(slope + s * width + v * LANES);
    for (int k = 0; k < 4; k++)
        for (int v = 0; v < wide; v++) *at(grad + k * width + v * LANES) = acc[k][v];
}

#define TILES(f, width, call) /* call(wide) for every 4 vectors of features, and for every one of those left */ \
    do {                                                                                                      \
        long f = 0;                                                                                           \
        for (; f + 4 * LANES <= (width); f += 4 * LANES) call(4);                                             \
        for (; f < (width); f += LANES) call(1);                                                              \
    } while (0)

/* One model and one block of samples: h in, `back` (the gradient with respect to it) out, grad added to. */
static float block(const float *w, float *grad, const float *h, float *back, float *out, const float *x, const float *shares, const float *weight,
                   long n, long count, long units, long rows, long width) {
    vec loss = {0};
    for (long s = 0; s < count; s += 4) {
#define CALL(wide) outputs(h + s * units, units, w + f, out + s * width + f, rows, width, wide)
        TILES(f, width, CALL);
#undef CALL
    }
    for (long s = 0; s < count; s++) {
        const float share = shares ? shares[s] : 1.0f / n;
        loss += share * slopes(out + s * width, x + s * width, weight, 2 * share, width);
    }
    for (long s = 0; s < count; s += 4)
        for (long k = 0; k < rows; k += 4) inner(out + s * width, w + k * width, back + s * units + k, units, width);
    for (long k = 0; k < rows; k += 4) {
#define CALL(wide) outer(h + k, units, out + f, grad + k * width + f, count, width, wide)
        TILES(f, width, CALL);
#undef CALL
    }
    quad q = sums(loss, (vec){0}, (vec){0}, (vec){0});
    return q[0];
}

/* All models that see the same samples */
static void models(const float *w, float *grad, float *losses, const uint8_t *x, lists on, const float *shares, const float *weight, long configs,
                   long n, long rows, long width, float *scratch) {
    const long units = UNITS(configs, rows);
    float *columns = scratch, *gradient = columns + units * width, *h = gradient + units * width, *back = h + BLOCK * units;
    float *out = back + BLOCK * units, *values = out + BLOCK * width;
    memset(grad, 0, configs * rows * width * sizeof *grad);
    memset(losses, 0, configs * sizeof *losses);
    memset(scratch, 0, SCRATCH(units, width));
    for (long f = 0; f < width; f++)
        for (long u = 0; u < configs * rows; u++) columns[f * units + u] = w[u * width + f];
    for (long first = 0; first < n; first += BLOCK) {
        const long count = n - first < BLOCK ? n - first : BLOCK;
        const int64_t *begin = on.begin + first;
        memset(h, 0, BLOCK * units * sizeof *h);
        for (long s = 0; s < count; s++) {
            for (long f = 0; f < width; f++) values[s * width + f] = x[(first + s) * width + f];
            for (int64_t i = begin[s]; i < begin[s + 1]; i++)
                for (long u = 0; u < units; u += LANES) *at(h + s * units + u) += *at(columns + on.index[i] * units + u);
            for (long c = 1; c <= configs; c++) h[s * units + c * rows - 1] = 1; /* the bias is the weight of a unit that is always on */
        }
        for (long c = 0; c < configs; c++)
            losses[c] += block(w + c * rows * width, grad + c * rows * width, h + c * rows, back + c * rows, out, values,
                               shares ? shares + first : 0, weight, n, count, units, rows, width);
        for (long s = 0; s < count; s++)
            for (int64_t i = begin[s]; i < begin[s + 1]; i++)
                for (long u = 0; u < units; u += LANES) *at(gradient + on.index[i] * units + u) += *at(back + s * units + u);
    }
    for (long u = 0; u < configs * rows; u++)
        if ((u + 1) % rows) /* the unit that is always on does not read x */
            for (long f = 0; f < width; f++) grad[u * width + f] += gradient[f * units + u];
}

/* 0, or 1 where there is no memory */
int step(const float *theta, float *grad, float *losses, const uint8_t *x, const float *shares, const float *weight, long instances, long configs,
         long rows, long width, long sets, long n) {
    const long units = UNITS(configs, rows);
    lists on = {malloc((n + 1) * sizeof(int64_t)), malloc(n * width * sizeof(int32_t))};
    float *scratch = malloc(SCRATCH(units, width));
    const int failed = !on.begin || !on.index || !scratch;
    for (long i = 0; i < instances && !failed; i++) {
        const uint8_t *own = x + (sets > 1 ? i * n * width : 0);
        if (i < sets) find(own, n, width, on);
        models(theta + i * configs * rows * width, grad + i * configs * rows * width, losses + i * configs, own, on, shares ? shares + i * n : 0, weight, configs, n,
               rows, width, scratch);
    }
    free(on.begin), free(on.index), free(scratch);
    return failed;
}
