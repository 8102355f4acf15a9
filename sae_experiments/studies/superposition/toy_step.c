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
#define SCRATCH(units, width) (2 * ((units) * (width) + BLOCK * ((units) + (width))) * sizeof(float))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t mask __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));

typedef struct {
    long configs, rows, width, n;
    long units;          /* hidden units of all configurations, one after the other, padded to whole vectors */
    const float *weight; /* share of each feature in the loss */
    int64_t *begin;      /* the features that are on in sample s: index[begin[s]] up to, not including, index[begin[s + 1]] */
    int32_t *index;
    float *scratch;
} task;

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

/* Lists the features that are on in each sample of x (n, width), eight bytes at a time. */
static void find(task *t, const uint8_t *x) {
    int64_t count = 0;
    for (long s = 0; s < t->n; s++) {
        t->begin[s] = count;
        for (long f = 0; f < t->width; f += 8) {
            uint64_t word;
            memcpy(&word, x + s * t->width + f, 8);
            for (; word; word &= word - 1) {
                const int bit = __builtin_ctzll(word);
                t->index[count++] = (int32_t)(f + (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? bit >> 3 : 7 - (bit >> 3)));
            }
        }
    }
    t->begin[t->n] = count;
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

/* One model and `count` samples: h in; `back`, the gradient with respect to h, out; grad added to. The loss of these samples. */
static float block(
    const task *t, const float *w, float *grad, const float *h, float *back, float *out, const float *x, const float *shares, long count) {
    const long rows = t->rows, width = t->width, units = t->units, whole = width / (4 * LANES) * 4 * LANES;
    vec loss = {0};
    for (long s = 0; s < count; s += 4) {
        for (long f = 0; f < whole; f += 4 * LANES) outputs(h + s * units, units, w + f, out + s * width + f, rows, width, 4);
        for (long f = whole; f < width; f += LANES) outputs(h + s * units, units, w + f, out + s * width + f, rows, width, 1);
    }
    for (long s = 0; s < count; s++) {
        const float share = shares ? shares[s] : 1.0f / t->n;
        loss += share * slopes(out + s * width, x + s * width, t->weight, 2 * share, width);
    }
    for (long s = 0; s < count; s += 4)
        for (long k = 0; k < rows; k += 4) inner(out + s * width, w + k * width, back + s * units + k, units, width);
    for (long k = 0; k < rows; k += 4) {
        for (long f = 0; f < whole; f += 4 * LANES) outer(h + k, units, out + f, grad + k * width + f, count, width, 4);
        for (long f = whole; f < width; f += LANES) outer(h + k, units, out + f, grad + k * width + f, count, width, 1);
    }
    return sums(loss, (vec){0}, (vec){0}, (vec){0})[0];
}

/* All configurations of an instance: they see the same samples x (n, width), whose features that are on `find` has listed. */
static void models(const task *t, const float *w, float *grad, float *losses, const uint8_t *x, const float *shares) {
    const long rows = t->rows, width = t->width, units = t->units, own = t->configs * rows;
    float *columns = t->scratch, *gradient = columns + units * width; /* of W, transposed: (width, units) */
    float *h = gradient + units * width, *back = h + BLOCK * units, *out = back + BLOCK * units, *values = out + BLOCK * width;
    memset(grad, 0, own * width * sizeof *grad);
    memset(losses, 0, t->configs * sizeof *losses);
    memset(t->scratch, 0, SCRATCH(units, width));
    for (long f = 0; f < width; f++)
        for (long u = 0; u < own; u++) columns[f * units + u] = w[u * width + f];
    for (long first = 0; first < t->n; first += BLOCK) {
        const long count = t->n - first < BLOCK ? t->n - first : BLOCK;
        const int64_t *begin = t->begin + first;
        memset(h, 0, BLOCK * units * sizeof *h);
        for (long s = 0; s < count; s++) {
            for (long f = 0; f < width; f++) values[s * width + f] = x[(first + s) * width + f];
            for (int64_t i = begin[s]; i < begin[s + 1]; i++)
                for (long u = 0; u < units; u += LANES) *at(h + s * units + u) += *at(columns + t->index[i] * units + u);
            for (long c = 1; c <= t->configs; c++) h[s * units + c * rows - 1] = 1; /* the bias is the weight of a unit that is always on */
        }
        for (long c = 0; c < t->configs; c++)
            losses[c] += block(t, w + c * rows * width, grad + c * rows * width, h + c * rows, back + c * rows, out, values,
                               shares ? shares + first : 0, count);
        for (long s = 0; s < count; s++)
            for (int64_t i = begin[s]; i < begin[s + 1]; i++)
                for (long u = 0; u < units; u += LANES) *at(gradient + t->index[i] * units + u) += *at(back + s * units + u);
    }
    for (long u = 0; u < own; u++)
        if ((u + 1) % rows) /* the unit that is always on does not read x */
            for (long f = 0; f < width; f++) grad[u * width + f] += gradient[f * units + u];
}

/* 0, or 1 where there is no memory */
int step(const float *theta, float *grad, float *losses, const uint8_t *x, const float *shares, const float *weight, long instances, long configs,
         long rows, long width, long sets, long n) {
    const long units = (configs * rows + LANES - 1) / LANES * LANES, size = configs * rows * width;
    task t = {configs, rows, width, n, units, weight, 0, 0, 0};
    t.begin = malloc((n + 1) * sizeof *t.begin);
    t.index = malloc(n * width * sizeof *t.index);
    t.scratch = malloc(SCRATCH(units, width));
    const int failed = !t.begin || !t.index || !t.scratch;
    for (long i = 0; i < instances && !failed; i++) {
        const uint8_t *own = sets > 1 ? x + i * n * width : x;
        if (i < sets) find(&t, own);
        models(&t, theta + i * size, grad + i * size, losses + i * configs, own, shares ? shares + i * n : 0);
    }
    free(t.begin), free(t.index), free(t.scratch);
    return failed;
}
