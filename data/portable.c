/* The arithmetic of `determinism=portable`, fused. Each function gives the bits of its plain form
   in the chapters `portable_functions` and `portable_layers`: the same operations in the same
   order, compiled with -ffp-contract=off. Arrays are contiguous. The last two arguments of each
   function say at which row (or element) to begin and how many to do. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t i64;

static inline double of_bits(i64 bits) { double x; memcpy(&x, &bits, 8); return x; }
static inline i64 to_bits(double x) { i64 bits; memcpy(&bits, &x, 8); return bits; }
static inline double power_of_two(i64 n) { return of_bits((i64)((uint64_t)(n + 1023) << 52)); }
static const double MAGIC = 0x1.8p52;
/* To the nearest integer, half to even, for |x| < 2^51 */
static inline double nearest(double x) { return (x + MAGIC) - MAGIC; }

static inline i64 exponent_for(double top, i64 bits) {
    i64 e = (to_bits(top) >> 52) - 1022 - bits;
    return e < -960 ? -960 : e;
}

/* --- Functions */

static inline double exp1(double x) {
    x = x < -708.0 ? -708.0 : x;
    x = x > 709.0 ? 709.0 : x;
    double n = nearest(x * 0x1.71547652b82fep0);
    double r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
    double p = 0x1.ae64567f544e4p-26; /* 1/11! */
    p = p * r + 0x1.27e4fb7789f5cp-22;
    p = p * r + 0x1.71de3a556c734p-19;
    p = p * r + 0x1.a01a01a01a01ap-16;
    p = p * r + 0x1.a01a01a01a01ap-13;
    p = p * r + 0x1.6c16c16c16c17p-10;
    p = p * r + 0x1.1111111111111p-7;
    p = p * r + 0x1.5555555555555p-5;
    p = p * r + 0x1.5555555555555p-3;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    /* the lowest bits of n + MAGIC are those of the integer n */
    return p * of_bits((i64)((uint64_t)(to_bits(n + MAGIC) + 1023) << 52));
}

static inline double sigmoid1(double x) { return 1.0 / (1.0 + exp1(-x)); }

static inline double tanh1(double x) {
    double e = exp1(-2.0 * fabs(x));
    return copysign((1.0 - e) / (1.0 + e), x);
}

#define ELEMENTWISE(name, value)                                             \
    void name(const double *x, double *y, i64 first, i64 count) {            \
        for (i64 i = first; i < first + count; i++) y[i] = value;            \
    }
ELEMENTWISE(exp_n, exp1(x[i]))
ELEMENTWISE(sigmoid_n, sigmoid1(x[i]))
ELEMENTWISE(tanh_n, tanh1(x[i]))
ELEMENTWISE(silu_n, x[i] * sigmoid1(x[i]))

void silu_grad_n(const double *g, const double *x, double *y, i64 first, i64 count) {
    for (i64 i = first; i < first + count; i++) {
        double s = sigmoid1(x[i]);
        y[i] = g[i] * (s * (1.0 + x[i] * (1.0 - s)));
    }
}

/* --- Sums: numbers at a distance of half the length in pairs, then of a quarter */

static double tree(double *x, i64 n) { /* overwrites x */
    while (n > 1) {
        i64 half = 1;
        while (2 * half < n) half *= 2;
        for (i64 i = 0; i < n - half; i++) x[i] += x[half + i];
        n = half;
    }
    return n ? x[0] : 0.0;
}

void sum_rows(const double *x, double *y, i64 n, i64 first, i64 count) {
    double *room = malloc(n * sizeof(double));
    for (i64 r = first; r < first + count; r++) {
        memcpy(room, x + r * n, n * sizeof(double));
        y[r] = tree(room, n);
    }
    free(room);
}

/* --- Products: integers, and the powers of two that they are multiplied by */

/* `column` has n factors for each `group` of rows */
void integers_of_rows(const double *x, const double *column, double *q, double *scale, i64 n,
                      i64 bits, i64 group, i64 first, i64 count) {
    for (i64 r = first; r < first + count; r++) {
        const double *in = x + r * n;
        double *out = q + r * n, top = 0.0;
        if (column) {
            const double *f = column + r / group * n;
            for (i64 i = 0; i < n; i++) out[i] = in[i] * f[i];
            in = out;
        }
        #pragma omp simd reduction(max : top)
        for (i64 i = 0; i < n; i++) { double a = fabs(in[i]); top = a > top ? a : top; }
        i64 e = exponent_for(top, bits);
        double factor = power_of_two(-e);
        scale[r] = power_of_two(e);
        for (i64 i = 0; i < n; i++) out[i] = nearest(in[i] * factor);
    }
}

/* Blocks of `rows` rows of n; `row` has a factor for each row, `scale` n numbers for each block */
void integers_of_columns(const double *x, const double *row, double *q, double *scale, i64 rows,
                         i64 n, i64 bits, i64 first, i64 count) {
    double *room = malloc(n * sizeof(double));
    for (i64 b = first; b < first + count; b++) {
        const double *in = x + b * rows * n, *f = row + b * rows;
        double *out = q + b * rows * n, *s = scale + b * n;
        for (i64 i = 0; i < n; i++) room[i] = 0.0;
        for (i64 r = 0; r < rows; r++)
            for (i64 i = 0; i < n; i++) {
                double a = in[r * n + i] * f[r];
                out[r * n + i] = a;
                a = fabs(a);
                room[i] = a > room[i] ? a : room[i];
            }
        for (i64 i = 0; i < n; i++) {
            i64 e = exponent_for(room[i], bits);
            s[i] = power_of_two(e);
            room[i] = power_of_two(-e);
        }
        for (i64 r = 0; r < rows; r++)
            for (i64 i = 0; i < n; i++) out[r * n + i] = nearest(out[r * n + i] * room[i]);
    }
    free(room);
}

void scale_product(double *y, const double *row, const double *column, const double *bias, i64 n,
                   i64 first, i64 count) {
    for (i64 r = first; r < first + count; r++) {
        double *out = y + r * n, f = row[r];
        if (column) for (i64 i = 0; i < n; i++) out[i] = (out[i] * column[i]) * f;
        else for (i64 i = 0; i < n; i++) out[i] = out[i] * f;
        if (bias) for (i64 i = 0; i < n; i++) out[i] += bias[i];
    }
}

void add_on_grid(double *total, const double *x, const double *row, double factor, double magic,
                 i64 n, i64 first, i64 count) {
    for (i64 r = first; r < first + count; r++)
        for (i64 i = 0; i < n; i++)
            total[r * n + i] += (((x[r * n + i] * row[r]) * factor) + magic) - magic;
}

/* --- Attention: a row of x for each batch, head and query; masks for each batch and query */

void softmax_rows(double *x, const uint8_t *mask, double magic, i64 n, i64 per_batch, i64 queries,
                  i64 mask_batch, i64 mask_query, i64 first, i64 count) {
    for (i64 r = first; r < first + count; r++) {
        double *p = x + r * n, top = -INFINITY, sum = 0.0;
        const uint8_t *seen = mask + (r / per_batch) * mask_batch + (r % queries) * mask_query;
        for (i64 i = 0; i < n; i++) p[i] = seen[i] ? p[i] : -INFINITY;
        #pragma omp simd reduction(max : top)
        for (i64 i = 0; i < n; i++) top = p[i] > top ? p[i] : top;
        top = top == -INFINITY ? 0.0 : top;
        for (i64 i = 0; i < n; i++) { double e = exp1(p[i] - top); p[i] = seen[i] ? e : 0.0; }
        /* in any order: multiples of one power of two add up exactly */
        #pragma omp simd reduction(+ : sum)
        for (i64 i = 0; i < n; i++) sum += (p[i] + magic) - magic;
        sum = sum > 0.0 ? sum : 1.0;
        for (i64 i = 0; i < n; i++) p[i] = p[i] / sum;
    }
}

void softmax_grad_rows(const double *p, double *dp, double scale, i64 n, i64 first, i64 count) {
    double *room = malloc(n * sizeof(double));
    for (i64 r = first; r < first + count; r++) {
        const double *a = p + r * n;
        double *d = dp + r * n;
        for (i64 i = 0; i < n; i++) room[i] = d[i] = d[i] * a[i];
        double sum = tree(room, n);
        for (i64 i = 0; i < n; i++) d[i] = (d[i] - a[i] * sum) * scale;
    }
    free(room);
}

/* --- The loss: logits become probabilities, 0 at the target; log(total) + shift is the loss */

void head_rows(double *x, const i64 *targets, double *total, double *at_target, double *shift,
               double magic, i64 n, i64 first, i64 count) {
    for (i64 r = first; r < first + count; r++) {
        double *p = x + r * n, top = -INFINITY, sum = 0.0;
        i64 t = targets[r];
        if (t < 0) {
            memset(p, 0, n * sizeof(double));
            total[r] = at_target[r] = shift[r] = 0.0;
            continue;
        }
        double chosen = p[t];
        #pragma omp simd reduction(max : top)
        for (i64 i = 0; i < n; i++) top = p[i] > top ? p[i] : top;
        for (i64 i = 0; i < n; i++) p[i] = exp1(p[i] - top);
        #pragma omp simd reduction(+ : sum)
        for (i64 i = 0; i < n; i++) sum += (p[i] + magic) - magic;
        for (i64 i = 0; i < n; i++) p[i] = p[i] / sum;
        at_target[r] = p[t] - 1.0;
        p[t] = 0.0;
        total[r] = sum;
        shift[r] = top - chosen;
    }
}

/* --- AdamW: weights are rounded to float32, in which they are kept */

void adamw_n(double *w, const double *g, double *m, double *v, double decay, double b1, double c1,
             double b2, double c2, double step, double eps, i64 first, i64 count) {
    for (i64 i = first; i < first + count; i++) {
        double a = m[i] * b1 + g[i] * c1;
        double b = v[i] * b2 + (g[i] * g[i]) * c2;
        m[i] = a;
        v[i] = b;
        w[i] = (double)(float)(w[i] * decay - step * (a / (sqrt(b) + eps)));
    }
}
