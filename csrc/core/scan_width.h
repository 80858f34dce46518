/* The scan's kernels for one width, written once for all instruction sets.
 *
 * A file of one instruction set includes this once for each width W, having
 * defined OG_W, OG_LANES, OG_VEC (a vector), OG_MASK (what its comparisons
 * give, with | & ~) and, as inline functions that end in W: load, load_some
 * (the first n < lanes, zeros behind), fill (one value in all lanes), smax,
 * umax (signed, unsigned), gt_s, ge_s, gt_u, ge_u, eq, any (of a mask) and
 * spread (ORs a byte a lane into bits). Where there is no maximum of 64 bits
 * it defines OG_HALVES and judge64 instead.
 *
 * The hot loop is two operations a vector and no branch: as a signed integer,
 * positive NaN and Inf are the greatest values there are, as an unsigned one
 * the negative ones are. */

#define OG_JOIN_NOW(a, b) a##b
#define OG_JOIN(a, b) OG_JOIN_NOW(a, b)
#define OG_(name) OG_JOIN(name, OG_W)
#define OG_BYTES (OG_W / 8)
#define OG_STEP (OG_LANES * OG_BYTES)
#define OG_SIGN ((uint64_t)1 << (OG_W - 1))

#ifndef OG_HALVES
/* What the maxima of a run say. A NaN may stand before an Inf. */
static inline uint8_t
OG_(judge)(OG_VEC high, OG_VEC low, const og_format *f)
{
    const OG_VEC inf = OG_(fill)(f->inf);
    const OG_VEC minus_inf = OG_(fill)(f->inf | OG_SIGN);
    OG_MASK positive = OG_(ge_s)(high, inf);
    OG_MASK negative = OG_(ge_u)(low, minus_inf);
    if (OG_LIKELY(!OG_(any)(positive | negative))) {
        return 0;
    }
    OG_MASK nan_high = OG_(gt_s)(high, inf);
    OG_MASK nan_low = OG_(gt_u)(low, minus_inf);
    unsigned bits = OG_(any)(nan_high | nan_low) ? OG_FOUND_NAN : 0;
    bits |= OG_(any)(positive & ~nan_high) ? OG_FOUND_POS_INF : 0;
    bits |= OG_(any)(negative & ~nan_low) ? OG_FOUND_NEG_INF : 0;
    bits &= f->keep;
    if ((bits & OG_FOUND_NAN) != 0 && f->keep != OG_FOUND_NAN) {
        bits |= OG_FOUND_UNSURE;
    }
    return (uint8_t)bits;
}
#endif

/* The rest of a run, fewer than a vector: again what is already done where
 * that saves the short load. */
static inline OG_VEC
OG_(load_last)(const char *p, int64_t done, int64_t n)
{
    if (n >= OG_LANES) {
        return OG_(load)(p + (n - OG_LANES) * OG_BYTES);
    }
    return OG_(load_some)(p + done * OG_BYTES, n - done);
}

static uint8_t
OG_(fast)(const void *run, int64_t n, const og_format *f)
{
    const char *p = run;
    OG_VEC s0 = OG_(fill)(0), s1 = s0, s2 = s0, s3 = s0;
    OG_VEC u0 = s0, u1 = s0, u2 = s0, u3 = s0;
    int64_t i = 0;
    for (; i + 4 * OG_LANES <= n; i += 4 * OG_LANES) {
        const char *at = p + i * OG_BYTES;
        OG_VEC a = OG_(load)(at), b = OG_(load)(at + OG_STEP);
        OG_VEC c = OG_(load)(at + 2 * OG_STEP);
        OG_VEC d = OG_(load)(at + 3 * OG_STEP);
        s0 = OG_(smax)(s0, a);
        u0 = OG_(umax)(u0, a);
        s1 = OG_(smax)(s1, b);
        u1 = OG_(umax)(u1, b);
        s2 = OG_(smax)(s2, c);
        u2 = OG_(umax)(u2, c);
        s3 = OG_(smax)(s3, d);
        u3 = OG_(umax)(u3, d);
    }
    for (; i + OG_LANES <= n; i += OG_LANES) {
        OG_VEC a = OG_(load)(p + i * OG_BYTES);
        s0 = OG_(smax)(s0, a);
        u0 = OG_(umax)(u0, a);
    }
    if (i < n) {
        OG_VEC a = OG_(load_last)(p, i, n);
        s1 = OG_(smax)(s1, a);
        u1 = OG_(umax)(u1, a);
    }
    s0 = OG_(smax)(OG_(smax)(s0, s1), OG_(smax)(s2, s3));
    u0 = OG_(umax)(OG_(umax)(u0, u1), OG_(umax)(u2, u3));
    return OG_(judge)(s0, u0, f);
}

/* The three questions about one vector. */
typedef struct OG_(answers) {
    OG_MASK nan;
    OG_MASK positive;
    OG_MASK negative;
} OG_(answers);

static inline OG_(answers) OG_(ask)(OG_VEC x, const og_format *f)
{
    OG_VEC magnitude = x & OG_(fill)(OG_SIGN - 1);
    OG_(answers)
    a = {OG_(gt_u)(magnitude, OG_(fill)(f->inf)),
         OG_(eq)(x, OG_(fill)(f->inf)),
         OG_(eq)(x, OG_(fill)(f->inf | OG_SIGN))};
    return a;
}

static uint8_t
OG_(exact)(const void *run, int64_t n, const og_format *f)
{
    const char *p = run;
    OG_(answers) all = {0};
    for (int64_t i = 0; i < n; i += OG_LANES) {
        OG_VEC x = i + OG_LANES <= n ? OG_(load)(p + i * OG_BYTES)
                                     : OG_(load_last)(p, i, n);
        OG_(answers) now = OG_(ask)(x, f);
        all.nan |= now.nan;
        all.positive |= now.positive;
        all.negative |= now.negative;
    }
    unsigned bits = OG_(any)(all.nan) ? OG_FOUND_NAN : 0;
    bits |= OG_(any)(all.positive) ? OG_FOUND_POS_INF : 0;
    bits |= OG_(any)(all.negative) ? OG_FOUND_NEG_INF : 0;
    return (uint8_t)(bits & f->keep);
}

#ifndef OG_SCALAR_EACH
static void
OG_(each)(const void *run, int64_t n, const og_format *f, uint8_t *bits)
{
    const char *p = run;
    int64_t i = 0;
    for (; i + OG_LANES <= n; i += OG_LANES) {
        OG_(answers) now = OG_(ask)(OG_(load)(p + i * OG_BYTES), f);
        if (OG_(any)(now.nan | now.positive | now.negative)) {
            OG_(spread)(bits + i, now.nan, now.positive, now.negative,
                        f->keep);
        }
    }
    if (i < n) {
        OG_(og_scalar_each)(p + i * OG_BYTES, n - i, f, bits + i);
    }
}
#endif

static uint8_t
OG_(outside)(const void *run, int64_t n, const og_format *f)
{
    const char *p = run;
    const OG_VEC limit = OG_(fill)(f->inf);
    OG_MASK outside = {0};
    for (int64_t i = 0; i < n; i += OG_LANES) {
        OG_VEC x = i + OG_LANES <= n ? OG_(load)(p + i * OG_BYTES)
                                     : OG_(load_last)(p, i, n);
        outside |= OG_(ge_u)(x, limit);
    }
    return OG_(any)(outside) ? OG_FOUND_OUTSIDE : 0;
}

#undef OG_JOIN_NOW
#undef OG_JOIN
#undef OG_
#undef OG_BYTES
#undef OG_STEP
#undef OG_SIGN
#undef OG_W
#undef OG_LANES
#undef OG_VEC
#undef OG_MASK
#undef OG_HALVES
#undef OG_SCALAR_EACH
