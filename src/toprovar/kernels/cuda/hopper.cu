// toprovar::EntropyAttention for Hopper (sm_90a): softmax(scale q.k) v and the entropy of every query, in one pass.
//
// Tensors are sequence-first and contiguous: q, out [N, R, H, D]; keys and values come in two pieces, past [P, R, H, D]
// and new [L, R, H, D]. One CTA works on TILE_M queries of one (row, head) at a time; a producer warp brings K and V by
// TMA (128-byte swizzle, STAGES deep), two or three consumer warpgroups of 64 queries each take turns on the tensor
// cores: while one runs its two products (S = q k^T of block j, O += P v of block j - 1), the others do their softmax.
// For problems that such tiles would not fill there are builds with one consumer and two CTAs to an SM, which overlap
// without turns.
//
// The entropy is the centred recurrence in the exp2 domain. With c = scale log2(e), s = c q.k and a reference m per
// query, the sums l = sum 2^(s - m) and u = sum 2^(s - m) (s - m) over the keys seen so far give
//
//     H = ln 2 (log2 l - u / l)                          LSE = ln 2 (m + log2 l)
//
// and when the reference moves from m to m', a = 2^(m - m'):   u <- a (u + (m - m') l),  l <- a l,  O <- a O.
// m need not be the maximum, it only has to stay in reach of it: H, LSE and O do not depend on it. So no maximum is
// taken at all after the first block of a tile: the terms are formed with the m at hand, and only if their sum passes
// LIMIT (some score is 41 nats, with fp16 12 nats, above all of the first block) are the block's scores formed once
// more, and m moved. This takes the maximum, the exchange between the four threads of a query and the rescaling of O
// out of nearly every block.
//
// Work is dealt to a persistent grid. Tiles [0, full_tiles) are dealt whole, in rounds. The rest, which would leave
// part of the GPU idle in a last round, is cut into equal runs of key blocks regardless of where tiles end. A tile that
// is cut leaves unnormalised parts (O, m, l, u) in the workspace, and `toprovar_attention_finish` merges them. The same
// mechanism is split-KV when there are few queries. The finish kernel also takes the mean of the entropy over heads; it
// reads nothing larger than the per-head entropy.
//
// Launch (everything a C++ caller has to know; `hopper.py` holds the same as the table `VARIANTS`):
//
//   toprovar_attention_forward<<<ctas, THREADS, SHARED_BYTES>>>(   at most CTAS_PER_SM per SM
//     CUtensorMap q, past_k, past_v, new_k, new_v, past_k_seam, past_v_seam, new_k_seam, new_v_seam,
//                                                     3-D maps {D, R*H, length}, strides {D, R*H*D} * 2 bytes, 128-byte
//                                                     swizzle, zero fill; box {64, 1, TILE_M} for q, {64, 1, SEAM} for
//                                                     the seams, {64, 1, TILE_N} for the others. An empty
//                                                     piece takes the other piece's maps (they are not read)
//     void* out, float* head_entropy, float* lse,     [N,R,H,D]; [R,H,N], null only if built without ENTROPY; [R,H,N]
//                                                     or null
//     float* part_out, float* part_stats,             workspace, 2 * runs slots of TILE_M * D and of 3 * TILE_M floats
//     int queries, int past, int fresh, int row_heads, float scale_log2,       scale_log2 = scale * log2(e) > 0
//     int full_tiles, int run)                        run: key blocks of a run over the tiles from full_tiles on
//   toprovar_attention_finish<<<blocks, 256>>>(...)   merges and takes the mean, see there
//   toprovar_attention_small<<<R * H, 256, SMALL_SHARED_BYTES>>>(...)
//                                                     in the forward kernel's place for at most 64 queries on 128 keys
// All three may be launched with programmatic stream serialisation: each waits for the kernel before it.
//
// Built by hopper.py with these macros: DTYPE (0 bf16, 1 fp16), HEAD_DIM (64, 80, 96, 128), TILE_N, CONSUMERS, STAGES,
// CTAS_PER_SM, ENTROPY (0, 1). `hopper_wgmma.cuh` is written by hopper.py: wrappers wgmma_qk and wgmma_pv of the two matrix
// instructions, whose operand lists depend on the tile. No other header is used, so NVRTC compiles this as it is.

#include "hopper_wgmma.cuh"

typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {
    u64 opaque[16];
};

namespace {

constexpr int TILE_M = 64 * CONSUMERS;
constexpr int HALVES = (HEAD_DIM + 63) / 64;          // a row of a tile is kept as 64-element pieces of 128 bytes
constexpr int QUERY_BYTES = HALVES * TILE_M * 128;
constexpr int KEY_BYTES = HALVES * TILE_N * 128;      // one stage of K, or of V
constexpr int THREADS = 128 * (CONSUMERS + 1);
// Registers of a thread at launch, and after the producer has given its own away.
constexpr int LAUNCH_REGISTERS = 65536 / (THREADS * CTAS_PER_SM) / 8 * 8;
constexpr int PRODUCER_REGISTERS = CONSUMERS == 1 ? 40 : CONSUMERS == 2 ? 24 : 32;
constexpr int CONSUMER_REGISTERS = LAUNCH_REGISTERS + (LAUNCH_REGISTERS - PRODUCER_REGISTERS) / CONSUMERS / 8 * 8;
constexpr int SCORES = TILE_N / 2;                    // fp32 accumulators per thread
constexpr int OUTPUTS = HEAD_DIM / 2;
constexpr int PAIRS = TILE_N / 4;                     // P packed to 16 bits
constexpr int GROUPS = HEAD_DIM / 8;                  // 8-column groups of the output
constexpr int SEAM = 16;                              // rows of the small boxes, see Problem
constexpr float MASKED = -1e30f;                      // finite: p = 0 and p * (s - m) = -0, where -inf would give NaN
// How far above the reference m the terms of a block may reach, as this thread's sum of them. fp16 holds no term above
// 65504; there m is put BIAS above the first maximum, so that what is left below (2^-24) is still far from mattering.
constexpr float LIMIT = DTYPE == 0 ? 0x1p60f : 0x1p14f;
constexpr float BIAS = DTYPE == 0 ? 0.f : 4.f;
constexpr float LN2 = 0.693147180559945f;

static_assert(TILE_N % 16 == 0 && TILE_N <= 256, "TILE_N is the N of one wgmma and the K of the other");
static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM <= 128, "head dims beyond 128 do not fit the registers");

// --- barriers and copies ---------------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(u32 bar, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra.uni over;\n"
        "bra.uni again;\n"
        "over:\n}\n" ::"r"(bar), "r"(parity) : "memory");
}

// One box of a tensor map to shared memory.
__device__ __forceinline__ void tma_load(u32 to, const TensorMap* map, u32 bar, int column, int row_head, int key) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
        "l"(map), "r"(bar), "r"(column), "r"(row_head), "r"(key) : "memory");
}

// --- tensor cores ----------------------------------------------------------------------------------------------------

// Low word of a shared-memory operand with 128-byte swizzle: address and strides in units of 16 bytes. `leading` is the
// step between 64-element pieces along N of a transposed operand (unused otherwise). The high word is the same for all
// of them (hopper.py writes it): 1024 bytes between groups of 8 rows, 128-byte swizzle. Steps inside a tile are added.
__device__ __forceinline__ u32 operand(u32 address, int leading) {
    return (address & 0x3ffff) >> 4 | (u32)(leading >> 4) << 16;  // in a cluster the higher bits tell the CTA
}

// Changes nothing, but tells ptxas that the warp agrees on x: the steps of an operand are then added in uniform registers,
// not by instructions that the other warpgroup's softmax, on the same quarter of the SM, has to make way for.
__device__ __forceinline__ u32 uniform(u32 x) { return __shfl_sync(0xffffffffu, x, 0); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The compiler must not move reads or writes of these registers across this point.
template <int COUNT>
__device__ __forceinline__ void pin(float (&values)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(values[i])::"memory");
}

__device__ __forceinline__ void multiply_qk(float (&scores)[SCORES], u32 a, u32 b) {
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++)
        wgmma_qk(scores, a + (k / 4 * TILE_M * 128 + k % 4 * 32) / 16, b + (k / 4 * TILE_N * 128 + k % 4 * 32) / 16, k > 0);
}

__device__ __forceinline__ void multiply_pv(float (&output)[OUTPUTS], const u32 (&weights)[PAIRS], u32 b) {
#pragma unroll
    for (int k = 0; k < TILE_N / 16; k++)
        wgmma_pv(output, weights[4 * k], weights[4 * k + 1], weights[4 * k + 2], weights[4 * k + 3], b + k * 2048 / 16);
}

// --- arithmetic ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#if DTYPE == 0
#define ELEMENT "bf16"
#else
#define ELEMENT "f16"
#endif

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 pair;
    asm("cvt.rn." ELEMENT "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ void load_matrices(u32 (&d)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(address) : "memory");
}

// The older product of one warp, m16n8k16.
__device__ __forceinline__ void multiply_small(float* c, const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." ELEMENT "." ELEMENT ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Softmax state of the two queries of a thread (rows g and g + 8 of its warp's 16). l and u are this thread's part of
// the sums: the recurrence is linear in them, so the four threads of a query add up only at the end.
struct Rows {
    float m[2], l[2], u[2], shrink[2];
};

// Terms p = 2^(s - m) in place of the scores, and this thread's sums of p and of p (s - m). One chain of additions per
// query for l and two for u, in a loop of their own: then ptxas, called by nvcc or by NVRTC, spreads them evenly between
// the exponentials. Every cycle of its count shows in the time (see docs/log.md).
__device__ __forceinline__ void exponentials(float (&s)[SCORES], const Rows& rows, float scale, float (&l)[2], float (&u)[2]) {
    float centred[SCORES];
#pragma unroll
    for (int i = 0; i < SCORES; i++) {
        centred[i] = fmaf(s[i], scale, -rows.m[i / 2 % 2]);
        s[i] = exp2_fast(centred[i]);
    }
#pragma unroll
    for (int i = 0; i < SCORES; i++) {
        const int r = i / 2 % 2;
        l[r] = i < 4 && i % 2 == 0 ? s[i] : l[r] + s[i];
    }
#if ENTROPY
    float weighted[4];
#pragma unroll
    for (int i = 0; i < SCORES; i++) weighted[i % 4] = i < 4 ? s[i] * centred[i] : fmaf(s[i], centred[i], weighted[i % 4]);
    u[0] = weighted[0] + weighted[1];
    u[1] = weighted[2] + weighted[3];
#else
    u[0] = u[1] = 0.f;
#endif
}

__device__ __forceinline__ void row_maxima(const float (&s)[SCORES], float (&top)[2]) {
    float other[2] = {s[1], s[3]};
    top[0] = s[0], top[1] = s[2];
#pragma unroll
    for (int i = 4; i < SCORES; i += 4) {
        top[0] = fmaxf(top[0], s[i]);
        other[0] = fmaxf(other[0], s[i + 1]);
        top[1] = fmaxf(top[1], s[i + 2]);
        other[1] = fmaxf(other[1], s[i + 3]);
    }
    top[0] = quad_max(fmaxf(top[0], other[0]));
    top[1] = quad_max(fmaxf(top[1], other[1]));
}

// Scores of a block once more, for the 16 queries of this warp alone, whose registers hold them as wgmma_qk leaves them.
__device__ __forceinline__ void scores_again(float (&s)[SCORES], u32 query, u32 key) {
    const int lane = threadIdx.x % 32, row = lane % 8;
    const u32 query_row = query + (threadIdx.x / 32 % 4 * 16 + lane % 16) * 128, key_row = key + (lane / 16 * 8 + row) * 128;
#pragma unroll
    for (int i = 0; i < SCORES; i++) s[i] = 0.f;
#pragma unroll 1
    for (int k = 0; k < HEAD_DIM / 16; k++) {
        const int half = k / 4, chunk = k % 4 * 2;
        u32 a[4], b[4];
        load_matrices(a, query_row + half * TILE_M * 128 + ((chunk + lane / 16) ^ row) * 16);
#pragma unroll
        for (int n = 0; n < TILE_N / 16; n++) {
            load_matrices(b, key_row + half * TILE_N * 128 + n * 2048 + ((chunk + lane / 8 % 2) ^ row) * 16);
            multiply_small(s + 8 * n, a, b[0], b[1]);
            multiply_small(s + 8 * n + 4, a, b[2], b[3]);
        }
    }
}

// Softmax of the first block of a tile.
__device__ __forceinline__ void softmax_first(float (&s)[SCORES], Rows& rows, float scale) {
    float top[2];
    row_maxima(s, top);
    rows.m[0] = fmaf(top[0], scale, BIAS);
    rows.m[1] = fmaf(top[1], scale, BIAS);
    exponentials(s, rows, scale, rows.l, rows.u);
}

// Softmax of a later block; true if the reference has moved, and O is to be multiplied by `shrink`. `again` forms the
// block's scores once more.
template <typename Again>
__device__ __forceinline__ bool softmax_next(float (&s)[SCORES], Rows& rows, float scale, Again again) {
    float l[2], u[2];
    exponentials(s, rows, scale, l, u);
    const bool moved = __any_sync(0xffffffffu, !(l[0] < LIMIT && l[1] < LIMIT));
    if (moved) {
        float top[2];
        again();
        row_maxima(s, top);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float m = fmaxf(rows.m[r], fmaf(top[r], scale, BIAS)), fall = rows.m[r] - m;
            rows.shrink[r] = exp2_fast(fall);
            rows.u[r] = rows.shrink[r] * fmaf(fall, rows.l[r], rows.u[r]);
            rows.l[r] *= rows.shrink[r];
            rows.m[r] = m;
        }
        exponentials(s, rows, scale, l, u);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        rows.l[r] += l[r];
        rows.u[r] += u[r];
    }
    return moved;
}

// Scores of rows [gap, resume) and [end, ...) of a block, which hold no key. Their K and V rows are zeros.
__device__ __forceinline__ void mask(float (&s)[SCORES], int gap, int resume, int end) {
    const int column = threadIdx.x % 4 * 2;
    gap -= column, resume -= column, end -= column;
#pragma unroll
    for (int i = 0; i < SCORES; i++) {
        const int at = i / 4 * 8 + i % 2;
        if (at >= end || (at >= gap && at < resume)) s[i] = MASKED;
    }
}

__device__ __forceinline__ void pack_weights(u32 (&weights)[PAIRS], const float (&s)[SCORES]) {
#pragma unroll
    for (int i = 0; i < PAIRS; i++) weights[i] = pack(s[2 * i], s[2 * i + 1]);
}

// Columns [32 set, 32 set + 32) of one query: the four threads of a query trade their pairs, so that each writes 16
// bytes and a query's 64 bytes leave together. `pairs[i]` holds columns 8 i + 2 t, + 1 of the set.
__device__ __forceinline__ void store_set(u32* row, int set, const u32 (&pairs)[4], bool live) {
    const int t = threadIdx.x % 4;
    const bool odd = t & 1, upper = t & 2;
    if (set * 4 + 4 <= GROUPS) {
        u32 a = odd ? pairs[1] : pairs[0], b = odd ? pairs[3] : pairs[2];
        u32 c = __shfl_xor_sync(0xffffffffu, odd ? pairs[0] : pairs[1], 1);
        u32 d = __shfl_xor_sync(0xffffffffu, odd ? pairs[2] : pairs[3], 1);
        u32 e = __shfl_xor_sync(0xffffffffu, upper ? a : b, 2);
        u32 f = __shfl_xor_sync(0xffffffffu, upper ? c : d, 2);
        if (upper) a = b, c = d;
        // a is the pair of columns t, c of t ^ 1, e of t ^ 2, f of t ^ 3, all of group t
        u32 x = odd ? c : a, y = odd ? a : c, z = odd ? f : e, w = odd ? e : f;
        uint4 packed = upper ? make_uint4(z, w, x, y) : make_uint4(x, y, z, w);
        if (live) *reinterpret_cast<uint4*>(row + set * 16 + t * 4) = packed;
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (set * 4 + i < GROUPS && live) row[set * 16 + i * 4 + t] = pairs[i];
    }
}

// --- who does what ---------------------------------------------------------------------------------------------------

// Keys are numbered past first, then new, with past rounded up to whole SEAM rows so that the block in which the pieces
// meet can be put together from small boxes; the rows in between are zeros, and masked.
struct Problem {
    int queries, past, seam, keys, row_heads, blocks, tiles_per_head, tiles;

    __device__ __forceinline__ Problem(int queries, int past, int fresh, int row_heads)
        : queries(queries), past(past), seam((past + SEAM - 1) / SEAM * SEAM), keys(seam + fresh), row_heads(row_heads),
          blocks((keys + TILE_N - 1) / TILE_N), tiles_per_head((queries + TILE_M - 1) / TILE_M),
          tiles(tiles_per_head * row_heads) {}
};

// The tiles and runs of one CTA, in the order in which its warps do them.
struct Schedule {
    int tile, first, last, slot;   // work in hand: blocks [first, last) of `tile`; slot < 0: the whole tile
    int next_tile, unit, unit_end, pieces;

    __device__ __forceinline__ Schedule(const Problem& problem, int cta, int full_tiles, int run) : next_tile(cta), pieces(0) {
        const int units = (problem.tiles - full_tiles) * problem.blocks;
        unit = min(cta * run, units);
        unit_end = min(unit + run, units);
    }

    __device__ __forceinline__ bool next(const Problem& problem, int cta, int ctas, int full_tiles) {
        if (next_tile < full_tiles) {
            tile = next_tile;
            next_tile += ctas;
            first = 0;
            last = problem.blocks;
            slot = -1;
            return true;
        }
        if (unit < unit_end) {
            const int split = unit / problem.blocks;
            tile = full_tiles + split;
            first = unit - split * problem.blocks;
            last = min(problem.blocks, first + unit_end - unit);
            slot = last - first == problem.blocks ? -1 : 2 * cta + pieces;
            unit += last - first;
            pieces++;
            return true;
        }
        return false;
    }
};

// The parts of a split tile: runs [first_cta, last_cta]. Only the first run can have begun in the tile before.
struct Parts {
    int first_cta, count, offset;

    __device__ __forceinline__ Parts(const Problem& problem, int split, int run) {
        const int begin = split * problem.blocks;
        first_cta = begin / run;
        count = (begin + problem.blocks - 1) / run - first_cta + 1;
        offset = first_cta * run < begin;
    }
    __device__ __forceinline__ bool cut() const { return count > 1; }
    __device__ __forceinline__ int slot(int part) const { return 2 * (first_cta + part) + (part == 0 ? offset : 0); }
};

struct Ring {
    int stage;
    u32 parity;
    __device__ __forceinline__ Ring() : stage(0), parity(0) {}
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// Shared memory: q, then STAGES of K, then STAGES of V, then the barriers, then 5 integers.
constexpr int KEYS_AT = QUERY_BYTES;
constexpr int VALUES_AT = KEYS_AT + STAGES * KEY_BYTES;
constexpr int BARRIERS_AT = VALUES_AT + STAGES * KEY_BYTES;
constexpr int QUERY_FULL = BARRIERS_AT, QUERY_FREE = BARRIERS_AT + 8, KEY_FULL = BARRIERS_AT + 16,
              KEY_FREE = KEY_FULL + 8 * STAGES, VALUE_FULL = KEY_FREE + 8 * STAGES, VALUE_FREE = VALUE_FULL + 8 * STAGES;
constexpr int MASK_AT = VALUE_FREE + 8 * STAGES;  // gap block, end block, past, seam, keys

// Starts the loads of one block of K or V.
__device__ __forceinline__ void load_block(const Problem& problem, u32 to, u32 full, int block, int row_head,
                                           const TensorMap* past_map, const TensorMap* new_map, const TensorMap* past_seam,
                                           const TensorMap* new_seam) {
    const int from = block * TILE_N;
    barrier_expect(full, KEY_BYTES);
    if (from >= problem.seam || from + TILE_N <= problem.seam || problem.seam == problem.keys) {
        const bool fresh = from >= problem.seam;
        const TensorMap* map = fresh ? new_map : past_map;
        for (int half = 0; half < HALVES; half++)
            tma_load(to + half * TILE_N * 128, map, full, half * 64, row_head, from - (fresh ? problem.seam : 0));
    } else {
        for (int row = 0; row < TILE_N; row += SEAM) {
            const bool fresh = from + row >= problem.seam;
            const TensorMap* map = fresh ? new_seam : past_seam;
            for (int half = 0; half < HALVES; half++)
                tma_load(to + half * TILE_N * 128 + row * 128, map, full, half * 64, row_head, from + row - (fresh ? problem.seam : 0));
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, CTAS_PER_SM)
    toprovar_attention_forward(const __grid_constant__ TensorMap query_map, const __grid_constant__ TensorMap past_key_map,
                               const __grid_constant__ TensorMap past_value_map, const __grid_constant__ TensorMap new_key_map,
                               const __grid_constant__ TensorMap new_value_map, const __grid_constant__ TensorMap past_key_seam,
                               const __grid_constant__ TensorMap past_value_seam, const __grid_constant__ TensorMap new_key_seam,
                               const __grid_constant__ TensorMap new_value_seam, void* out, float* head_entropy, float* lse,
                               float* part_out, float* part_stats, int queries, int past, int fresh, int row_heads,
                               float scale_log2, int full_tiles, int run) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const u32 base = (u32)__cvta_generic_to_shared(shared);
    const Problem problem(queries, past, fresh, row_heads);
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    const int cta = blockIdx.x, ctas = gridDim.x;

    if (threadIdx.x == 0) {
        barrier_init(base + QUERY_FULL, 1);
        barrier_init(base + QUERY_FREE, 4 * CONSUMERS);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(base + KEY_FULL + 8 * i, 1);
            barrier_init(base + VALUE_FULL + 8 * i, 1);
            barrier_init(base + KEY_FREE + 8 * i, 4 * CONSUMERS);
            barrier_init(base + VALUE_FREE + 8 * i, 4 * CONSUMERS);
        }
        int* masks = reinterpret_cast<int*>(shared + MASK_AT);
        masks[0] = problem.seam > problem.past ? problem.past / TILE_N : -1;
        masks[1] = problem.keys % TILE_N ? problem.blocks - 1 : -1;
        masks[2] = problem.past;
        masks[3] = problem.seam;
        masks[4] = problem.keys;
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    // The finish kernel may take its place on idle SMs now; it waits for the end of this one before it reads. This one has
    // been set up beside the kernel before it, and waits here.
    asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");

    Schedule work(problem, cta, full_tiles, run);

    if (warp < 4) {  // ---- producer
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        if (threadIdx.x == 0) {
            Ring keys, values;
            u32 query_parity = 1;
            while (work.next(problem, cta, ctas, full_tiles)) {
                const int row_head = work.tile / problem.tiles_per_head;
                const int tile_m = work.tile - row_head * problem.tiles_per_head;
                // In the order of use: K of block j + 1 is needed before V of block j. The first K of a tile may come while
                // the last one's queries are still in use.
                for (int step = work.first; step <= work.last; step++) {
                    if (step < work.last) {
                        barrier_wait(base + KEY_FREE + 8 * keys.stage, keys.parity ^ 1);
                        load_block(problem, base + KEYS_AT + keys.stage * KEY_BYTES, base + KEY_FULL + 8 * keys.stage, step, row_head,
                                   &past_key_map, &new_key_map, &past_key_seam, &new_key_seam);
                        keys.advance();
                    }
                    if (step == work.first) {
                        barrier_wait(base + QUERY_FREE, query_parity);
                        query_parity ^= 1;
                        barrier_expect(base + QUERY_FULL, QUERY_BYTES);
                        for (int half = 0; half < HALVES; half++)
                            tma_load(base + half * TILE_M * 128, &query_map, base + QUERY_FULL, half * 64, row_head, tile_m * TILE_M);
                    }
                    if (step > work.first) {
                        barrier_wait(base + VALUE_FREE + 8 * values.stage, values.parity ^ 1);
                        load_block(problem, base + VALUES_AT + values.stage * KEY_BYTES, base + VALUE_FULL + 8 * values.stage, step - 1,
                                   row_head, &past_value_map, &new_value_map, &past_value_seam, &new_value_seam);
                        values.advance();
                    }
                }
            }
        }
    } else {  // ---- consumers
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        const int group = warp / 4 - 1;
        const bool leader = threadIdx.x % 32 == 0;
        const u32 query = base + group * 64 * 128;
        const int my_turn = 1 + group, next_turn = 1 + (group + 1) % CONSUMERS;
        Ring keys, values;
        u32 query_parity = 0;
        float scores[SCORES], output[OUTPUTS];
        u32 weights[PAIRS];
        Rows rows;

        auto turn_take = [&] {
            if constexpr (CONSUMERS > 1) asm volatile("bar.sync %0, 256;" ::"r"(my_turn) : "memory");
        };
        auto turn_pass = [&] {
            if constexpr (CONSUMERS > 1) asm volatile("bar.arrive %0, 256;" ::"r"(next_turn) : "memory");
        };
        auto release = [&](u32 bar) {
            if (leader) barrier_arrive(bar);
        };
        auto key_tile = [&] { return base + KEYS_AT + keys.stage * KEY_BYTES; };
        auto query_operand = [&] { return uniform(operand(query, 16)); };
        auto key_operand = [&] { return uniform(operand(key_tile(), 16)); };
        auto value_operand = [&] { return operand(base + VALUES_AT + values.stage * KEY_BYTES, TILE_N * 128); };
        // Which blocks have rows without a key. Kept in shared memory: there is no register left for it in the loop.
        auto has_gap = [&](int block) {
            int gap_block, end_block;
            asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(gap_block), "=r"(end_block) : "r"(base + MASK_AT));
            return block == gap_block || block == end_block;
        };
        auto mask_block = [&](int block) {
            int gap, resume, end;
            asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(gap), "=r"(resume) : "r"(base + MASK_AT + 8));
            asm volatile("ld.shared.b32 %0, [%1];" : "=r"(end) : "r"(base + MASK_AT + 16));
            mask(scores, gap - block * TILE_N, resume - block * TILE_N, end - block * TILE_N);
        };

        if (CONSUMERS > 1 && group == CONSUMERS - 1) turn_pass();  // the first turn is group 0's

        while (work.next(problem, cta, ctas, full_tiles)) {
            barrier_wait(base + QUERY_FULL, query_parity);
            query_parity ^= 1;
            barrier_wait(base + KEY_FULL + 8 * keys.stage, keys.parity);
            wgmma_fence();
            multiply_qk(scores, query_operand(), key_operand());
            wgmma_commit();
#pragma unroll
            for (int i = 0; i < OUTPUTS; i++) output[i] = 0.f;
            wgmma_wait<0>();
            pin(scores);
            release(base + KEY_FREE + 8 * keys.stage);
            keys.advance();
            if (has_gap(work.first)) mask_block(work.first);
            softmax_first(scores, rows, scale_log2);
            pack_weights(weights, scores);

            u32 key = key_operand(), next_value = value_operand();
#pragma unroll 1
            for (int block = work.first + 1; block < work.last; block++) {
                barrier_wait(base + KEY_FULL + 8 * keys.stage, keys.parity);
                turn_take();
                pin(output);
                const u32 value = uniform(next_value);
                wgmma_fence();
                multiply_qk(scores, query_operand(), key);
                wgmma_commit();
                barrier_wait(base + VALUE_FULL + 8 * values.stage, values.parity);
                multiply_pv(output, weights, value);
                wgmma_commit();
                const bool gap = has_gap(block);  // asked here, where there is time
                wgmma_wait<1>();
                pin(scores);
                turn_pass();  // the other group's scores may now be formed beside this one's product with V
                if (gap) mask_block(block);
                // K is held until here for the rare case that its scores are needed twice. The branches inside also keep
                // ptxas from sinking the softmax below the wait for O, where nothing would run beside it.
                const bool moved = softmax_next(scores, rows, scale_log2, [&] {
                    scores_again(scores, query, key_tile());
                    if (has_gap(block)) mask_block(block);
                });
                release(base + KEY_FREE + 8 * keys.stage);
                keys.advance();
                wgmma_wait<0>();
                pin(output);
                pin(scores);
                release(base + VALUE_FREE + 8 * values.stage);
                values.advance();
                key = key_operand(), next_value = value_operand();  // of the next block, before its turn comes
                asm volatile("" : "+r"(next_value));                // not later, whatever ptxas thinks
                if (moved) {
#pragma unroll
                    for (int i = 0; i < OUTPUTS; i++) output[i] *= rows.shrink[i / 2 % 2];
                }
                pack_weights(weights, scores);
            }

            if (leader) barrier_arrive(base + QUERY_FREE);
            barrier_wait(base + VALUE_FULL + 8 * values.stage, values.parity);
            pin(output);
            wgmma_fence();
            multiply_pv(output, weights, value_operand());
            wgmma_commit();
            wgmma_wait<0>();
            pin(output);
            release(base + VALUE_FREE + 8 * values.stage);
            values.advance();
#pragma unroll
            for (int r = 0; r < 2; r++) {
                rows.l[r] = quad_sum(rows.l[r]);
#if ENTROPY
                rows.u[r] = quad_sum(rows.u[r]);
#endif
            }

            const int thread = threadIdx.x - 128;
            const int row_head = work.tile / problem.tiles_per_head;
            const int tile_m = work.tile - row_head * problem.tiles_per_head;
            const int in_tile = thread / 32 * 16 + thread % 32 / 4;
            if (work.slot >= 0) {
                const long long slot = work.slot;
                float4* parts = reinterpret_cast<float4*>(part_out + slot * (TILE_M * HEAD_DIM)) + thread;
#pragma unroll
                for (int i = 0; i < GROUPS; i++)
                    parts[i * (2 * TILE_M)] = make_float4(output[4 * i], output[4 * i + 1], output[4 * i + 2], output[4 * i + 3]);
                if (thread % 4 == 0) {
                    float* stats = part_stats + slot * (3 * TILE_M) + in_tile;
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        stats[8 * r] = rows.m[r];
                        stats[8 * r + TILE_M] = rows.l[r];
#if ENTROPY
                        stats[8 * r + 2 * TILE_M] = rows.u[r];
#endif
                    }
                }
            } else {
                const int n = tile_m * TILE_M + in_tile;
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const bool live = n + 8 * r < queries;
                    const float inverse = 1.f / rows.l[r];
                    u32* row = static_cast<u32*>(out) + ((long long)(n + 8 * r) * row_heads + row_head) * (HEAD_DIM / 2);
#pragma unroll
                    for (int set = 0; set < (GROUPS + 3) / 4; set++) {
                        u32 pairs[4];
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const int at = min(4 * (4 * set + i) + 2 * r, OUTPUTS - 2);
                            pairs[i] = pack(output[at] * inverse, output[at + 1] * inverse);
                        }
                        store_set(row, set, pairs, live);
                    }
                    if (thread % 4 == 0 && live) {
                        const long long at = (long long)row_head * queries + n + 8 * r;
                        const float log_sum = log2f(rows.l[r]);
#if ENTROPY
                        head_entropy[at] = LN2 * (log_sum - rows.u[r] * inverse);
#endif
                        if (lse != nullptr) lse[at] = LN2 * (rows.m[r] + log_sum);
                    }
                }
            }
        }
    }
}

// Merges the parts of split tiles and takes the mean of the entropy over heads. Blocks [0, merge_blocks), with
// merge_blocks = split_tiles * CONSUMERS * SETS / 2 rounded up and SETS = ceil(HEAD_DIM / 32): each half of a block
// merges 32 columns of the 64 queries of one warpgroup. The blocks behind them, one for 32 queries of a row, are there
// only if mean_entropy is not null.
extern "C" __global__ void __launch_bounds__(256)
    toprovar_attention_finish(void* out, float* head_entropy, float* lse, float* mean_entropy, const float* part_out,
                              const float* part_stats, int queries, int past, int fresh, int row_heads, int heads,
                              int full_tiles, int run) {
    // The kernel behind this one may be set up meanwhile, as this one is beside the kernel before it.
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    const Problem problem(queries, past, fresh, row_heads);
    constexpr int SETS = (GROUPS + 3) / 4;
    constexpr int BATCH = 4;  // parts whose loads are in flight together
    const int merges = (problem.tiles - full_tiles) * CONSUMERS * SETS;
    const int merge_blocks = (merges + 1) / 2;

    if ((int)blockIdx.x < merge_blocks) {
        int unit = blockIdx.x * 2 + threadIdx.x / 128;
        if (unit >= merges) return;
        const int set = unit % SETS;
        unit /= SETS;
        const int group = unit % CONSUMERS, split = unit / CONSUMERS;
        const int thread = group * 128 + threadIdx.x % 128, in_tile = thread / 32 * 16 + thread % 32 / 4;
        const Parts parts(problem, split, run);
        if (!parts.cut()) return;
        asm volatile("griddepcontrol.wait;" ::: "memory");
        float m[2] = {MASKED, MASKED}, l[2] = {0.f, 0.f}, u[2] = {0.f, 0.f}, sum[16];
#pragma unroll
        for (int i = 0; i < 16; i++) sum[i] = 0.f;
        for (int first = 0; first < parts.count; first += BATCH) {
            float stats[BATCH][2][3];
            float4 part[BATCH][4];
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
                const bool there = first + b < parts.count;
                const long long slot = parts.slot(there ? first + b : 0);
                const float* from = part_stats + slot * (3 * TILE_M) + in_tile;
                const float4* values = reinterpret_cast<const float4*>(part_out + slot * (TILE_M * HEAD_DIM)) + thread;
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    stats[b][r][0] = there ? from[8 * r] : MASKED;
                    stats[b][r][1] = there ? from[8 * r + TILE_M] : 0.f;
                    stats[b][r][2] = ENTROPY && there ? from[8 * r + 2 * TILE_M] : 0.f;
                }
#pragma unroll
                for (int i = 0; i < 4; i++) part[b][i] = values[min(4 * set + i, GROUPS - 1) * (2 * TILE_M)];
            }
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
                float keep[2], add[2];
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const float top = fmaxf(m[r], stats[b][r][0]);
                    const float old = m[r] - top, step = stats[b][r][0] - top;  // a part that is not there: 2^-1e30 = 0
                    keep[r] = exp2_fast(old);
                    add[r] = exp2_fast(step);
                    u[r] = keep[r] * fmaf(old, l[r], u[r]) + add[r] * fmaf(step, stats[b][r][1], stats[b][r][2]);
                    l[r] = keep[r] * l[r] + add[r] * stats[b][r][1];
                    m[r] = top;
                }
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    sum[4 * i] = keep[0] * sum[4 * i] + add[0] * part[b][i].x;
                    sum[4 * i + 1] = keep[0] * sum[4 * i + 1] + add[0] * part[b][i].y;
                    sum[4 * i + 2] = keep[1] * sum[4 * i + 2] + add[1] * part[b][i].z;
                    sum[4 * i + 3] = keep[1] * sum[4 * i + 3] + add[1] * part[b][i].w;
                }
            }
        }
        const int tile = full_tiles + split, row_head = tile / problem.tiles_per_head;
        const int n = (tile - row_head * problem.tiles_per_head) * TILE_M + in_tile;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const bool live = n + 8 * r < queries;
            const float inverse = 1.f / l[r];
            u32 pairs[4];
#pragma unroll
            for (int i = 0; i < 4; i++) pairs[i] = pack(sum[4 * i + 2 * r] * inverse, sum[4 * i + 2 * r + 1] * inverse);
            store_set(static_cast<u32*>(out) + ((long long)(n + 8 * r) * row_heads + row_head) * (HEAD_DIM / 2), set, pairs, live);
            if (set == 0 && thread % 4 == 0 && live) {
                const long long at = (long long)row_head * queries + n + 8 * r;
                const float log_sum = log2f(l[r]);
#if ENTROPY
                if (mean_entropy == nullptr) head_entropy[at] = LN2 * (log_sum - u[r] * inverse);
#endif
                if (lse != nullptr) lse[at] = LN2 * (m[r] + log_sum);
            }
        }
    }
#if ENTROPY
    else {
        // 8 threads share a query's heads; their sums meet in a fixed order, so the result is the same every time.
        __shared__ float sums[8][32];
        const int per_row = (queries + 31) / 32, block = blockIdx.x - merge_blocks;
        const int row = block / per_row, n = (block - row * per_row) * 32 + threadIdx.x % 32, share = threadIdx.x / 32;
        const int tile_m = n / TILE_M, in_tile = n % TILE_M;
        asm volatile("griddepcontrol.wait;" ::: "memory");
        float total = 0.f;
        if (n < queries && full_tiles >= problem.tiles) {
            for (int first = share; first < heads; first += 32) {  // four loads in flight, also for few heads
                float of_head[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int head = first + 8 * i;
                    of_head[i] = head < heads ? head_entropy[((long long)row * heads + head) * queries + n] : 0.f;
                }
                total += (of_head[0] + of_head[1]) + (of_head[2] + of_head[3]);
            }
        } else if (n < queries) {
            for (int head = share; head < heads; head += 8) {
                const int row_head = row * heads + head, tile = row_head * problem.tiles_per_head + tile_m;
                float value;
                bool cut = false;
                if (tile >= full_tiles) {
                    const Parts parts(problem, tile - full_tiles, run);
                    cut = parts.cut();
                    if (cut) {
                        float m = MASKED, l = 0.f, u = 0.f;
#pragma unroll 4
                        for (int i = 0; i < parts.count; i++) {
                            const float* from = part_stats + (long long)parts.slot(i) * (3 * TILE_M) + in_tile;
                            const float other = from[0], part = from[TILE_M], weighted = from[2 * TILE_M];
                            const float top = fmaxf(m, other), old = m - top, step = other - top;
                            const float keep = exp2_fast(old), add = exp2_fast(step);
                            u = keep * fmaf(old, l, u) + add * fmaf(step, part, weighted);
                            l = keep * l + add * part;
                            m = top;
                        }
                        value = LN2 * (log2f(l) - u / l);
                    }
                }
                if (!cut) value = head_entropy[(long long)row_head * queries + n];
                total += value;
            }
        }
        sums[share][threadIdx.x % 32] = total;
        __syncthreads();
        if (share == 0 && n < queries) {
#pragma unroll
            for (int i = 1; i < 8; i++) total += sums[i][threadIdx.x];
            mean_entropy[(long long)row * queries + n] = total / heads;
        }
    }
#endif
}

// --- few queries on few keys -----------------------------------------------------------------------------------------
//
// The first scales of an image (1, 4, ... 64 queries on at most 121 keys) are a matter of latency alone: one round of
// loads, the older warp-wide mma, one CTA of 8 warps per (row, head). The warps share the queries, and what warps are
// left the keys; shares of the keys meet in shared memory. The finish kernel takes the mean over heads (launched with
// full_tiles = all tiles).

namespace {

constexpr int SMALL_QUERIES = 64, SMALL_KEYS = 128;
constexpr int PITCH = HEAD_DIM * 2 + 16;  // bytes of a row: 16 more, so that 8 rows lie in different banks
constexpr int SMALL_K = SMALL_QUERIES * PITCH, SMALL_V = SMALL_K + SMALL_KEYS * PITCH;
constexpr int SMALL_PARTS = SMALL_K;      // the parts of O take the place of K and V
constexpr int SMALL_STATS = SMALL_V + SMALL_KEYS * PITCH;  // m, l, u of 8 warps x 16 queries
static_assert(2 * SMALL_KEYS * PITCH >= 7 * 16 * HEAD_DIM * 4, "the parts of O must fit where K and V were");

__device__ __forceinline__ void copy_async(u32 to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(u32 (&d)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(address) : "memory");
}

}  // namespace

// <<<R * H, 256, SMALL_STATS + 1536 bytes>>>; at most SMALL_QUERIES queries and SMALL_KEYS keys.
extern "C" __global__ void __launch_bounds__(256)
    toprovar_attention_small(const void* q, const void* past_k, const void* past_v, const void* new_k, const void* new_v, void* out,
                             float* head_entropy, float* lse, int queries, int past, int fresh, int row_heads,
                             float scale_log2) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const u32 base = (u32)__cvta_generic_to_shared(shared);
    float* stats = reinterpret_cast<float*>(shared + SMALL_STATS);
    const int row_head = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int keys = past + fresh, steps = (keys + 15) / 16;
    const int m_tiles = queries <= 16 ? 1 : queries <= 32 ? 2 : 4, shares = min(8 / m_tiles, steps);
    const int m_tile = warp % m_tiles, share = warp / m_tiles;
    constexpr int CHUNKS = HEAD_DIM / 8;
    auto element = [&](const void* tensor, int at) {
        return static_cast<const unsigned char*>(tensor) + ((long long)at * row_heads + row_head) * (HEAD_DIM * 2);
    };
    auto load_keys = [&](int to, const void* old, const void* next) {
        for (int i = threadIdx.x; i < steps * 16 * CHUNKS; i += 256) {
            const int key = i / CHUNKS, chunk = i % CHUNKS, from = min(key, keys - 1);
            copy_async(base + to + key * PITCH + chunk * 16, (from < past ? element(old, from) : element(next, from - past)) + chunk * 16, key < keys);
        }
    };
    asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
    load_keys(SMALL_K, past_k, new_k);
    for (int i = threadIdx.x; i < m_tiles * 16 * CHUNKS; i += 256) {
        const int at = i / CHUNKS, chunk = i % CHUNKS;
        copy_async(base + at * PITCH + chunk * 16, element(q, min(at, queries - 1)) + chunk * 16, at < queries);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    load_keys(SMALL_V, past_v, new_v);
    asm volatile("cp.async.commit_group;\ncp.async.wait_group 1;" ::: "memory");
    __syncthreads();

    // This warp: 16 queries, key steps share, share + shares, ... (at most 4).
    constexpr int MOST = SMALL_KEYS / 16 / 2;
    const bool busy = share < shares && m_tile * 16 < queries;
    float s[MOST][8], o[HEAD_DIM / 2];
    float m[2] = {MASKED, MASKED}, l[2] = {0.f, 0.f}, u[2] = {0.f, 0.f};
    if (busy) {
#pragma unroll
        for (int j = 0; j < MOST; j++)
#pragma unroll
            for (int i = 0; i < 8; i++) s[j][i] = 0.f;
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++) {
            u32 a[4], b[4];
            load_matrices(a, base + (m_tile * 16 + lane % 16) * PITCH + k * 32 + lane / 16 * 16);
#pragma unroll
            for (int j = 0; j < MOST; j++) {
                const int step = share + j * shares;
                if (step < steps) {
                    load_matrices(b, base + SMALL_K + (step * 16 + lane / 16 * 8 + lane % 8) * PITCH + k * 32 + lane / 8 % 2 * 16);
                    multiply_small(s[j], a, b[0], b[1]);
                    multiply_small(s[j] + 4, a, b[2], b[3]);
                }
            }
        }
#pragma unroll
        for (int j = 0; j < MOST; j++)
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if ((share + j * shares) * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2 >= keys) s[j][i] = MASKED;
                m[i / 2 % 2] = fmaxf(m[i / 2 % 2], s[j][i]);
            }
        m[0] = quad_max(m[0]) * scale_log2;
        m[1] = quad_max(m[1]) * scale_log2;
#pragma unroll
        for (int j = 0; j < MOST; j++)
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int r = i / 2 % 2;
                const float centred = fmaf(s[j][i], scale_log2, -m[r]);
                s[j][i] = exp2_fast(centred);
                l[r] += s[j][i];
                u[r] = fmaf(s[j][i], centred, u[r]);
            }
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; i++) o[i] = 0.f;
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    if (busy) {
#pragma unroll
        for (int j = 0; j < MOST; j++) {
            const int step = share + j * shares;
            if (step < steps) {
                const u32 a[4] = {pack(s[j][0], s[j][1]), pack(s[j][2], s[j][3]), pack(s[j][4], s[j][5]), pack(s[j][6], s[j][7])};
#pragma unroll
                for (int n = 0; n < HEAD_DIM / 16; n++) {
                    u32 b[4];
                    load_matrices_transposed(b, base + SMALL_V + (step * 16 + lane % 16) * PITCH + n * 32 + lane / 16 * 16);
                    multiply_small(o + 8 * n, a, b[0], b[1]);
                    multiply_small(o + 8 * n + 4, a, b[2], b[3]);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            l[r] = quad_sum(l[r]);
            u[r] = quad_sum(u[r]);
        }
    }
    if (shares > 1) {
        __syncthreads();  // K and V have been read: the parts may be written over them
        float4* parts = reinterpret_cast<float4*>(shared + SMALL_PARTS) + lane;
        if (busy && share > 0) {
            if (lane % 4 == 0)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float* to = stats + warp * 16 + lane / 4 + 8 * r;
                    to[0] = m[r], to[128] = l[r], to[256] = u[r];
                }
#pragma unroll
            for (int i = 0; i < GROUPS; i++)
                parts[((warp - m_tiles) * GROUPS + i) * 32] = make_float4(o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]);
        }
        __syncthreads();
        if (busy && share == 0) {
            for (int other = m_tile + m_tiles; other < shares * m_tiles; other += m_tiles) {
                float keep[2], add[2];
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const float* from = stats + other * 16 + lane / 4 + 8 * r;
                    const float top = fmaxf(m[r], from[0]), old = m[r] - top, step = from[0] - top;
                    keep[r] = exp2_fast(old);
                    add[r] = exp2_fast(step);
                    u[r] = keep[r] * fmaf(old, l[r], u[r]) + add[r] * fmaf(step, from[128], from[256]);
                    l[r] = keep[r] * l[r] + add[r] * from[128];
                    m[r] = top;
                }
#pragma unroll
                for (int i = 0; i < GROUPS; i++) {
                    const float4 part = parts[((other - m_tiles) * GROUPS + i) * 32];
                    o[4 * i] = keep[0] * o[4 * i] + add[0] * part.x;
                    o[4 * i + 1] = keep[0] * o[4 * i + 1] + add[0] * part.y;
                    o[4 * i + 2] = keep[1] * o[4 * i + 2] + add[1] * part.z;
                    o[4 * i + 3] = keep[1] * o[4 * i + 3] + add[1] * part.w;
                }
            }
        }
    }
    if (busy && share == 0) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int n = m_tile * 16 + lane / 4 + 8 * r;
            const bool live = n < queries;
            const float inverse = 1.f / l[r];
            u32* to = static_cast<u32*>(out) + ((long long)n * row_heads + row_head) * (HEAD_DIM / 2);
#pragma unroll
            for (int set = 0; set < (GROUPS + 3) / 4; set++) {
                u32 pairs[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int at = min(4 * (4 * set + i) + 2 * r, HEAD_DIM / 2 - 2);
                    pairs[i] = pack(o[at] * inverse, o[at + 1] * inverse);
                }
                store_set(to, set, pairs, live);
            }
            if (lane % 4 == 0 && live) {
                const float log_sum = log2f(l[r]);
                if (head_entropy != nullptr) head_entropy[(long long)row_head * queries + n] = LN2 * (log_sum - u[r] * inverse);
                if (lse != nullptr) lse[(long long)row_head * queries + n] = LN2 * (m[r] + log_sum);
            }
        }
    }
}
