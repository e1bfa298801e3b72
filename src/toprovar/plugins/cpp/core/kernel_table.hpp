// The cubins linked into this library, as constant data. `python -m toprovar.plugins.embed` writes the table from the
// index of a cubin library (kernels/aot.py, whose field names these are).
#pragma once

#include <cstddef>
#include <cstdint>

#include "toprovar/contract.hpp"

namespace toprovar {

enum class KernelKind : int32_t {
    kATTENTION_KERNEL,
    kMERGE_KERNEL,
    kMEAN_HEADS_KERNEL,
    kSELECT_KERNEL,
    kGATHER_KERNEL,
    kRESTORE_KERNEL,
    kHOPPER_ATTENTION,
};

inline constexpr int32_t kWIDE = 0;
inline constexpr int32_t kNARROW = 1;
inline constexpr int32_t kENTROPY_NONE = 0;
inline constexpr int32_t kENTROPY_MEAN = 1;

// What a launch of Hopper's CUDA C++ kernel needs beside the fields of every kernel (hopper.py: Variant).
struct HopperBuild {
    int32_t tileM;      // queries of a CTA
    int32_t tileN;      // keys of a block
    int32_t consumers;  // warpgroups of 64 queries
    int32_t ctasPerSm;  // that run at once
    int32_t tileNs;     // about what a tile and a block take: `chooseHopper` goes by them
    int32_t blockNs;
    int32_t seam;       // rows of the small boxes where past and new keys meet
    int32_t finishThreads;
    int32_t sets;         // blocks of 32 output columns
    int32_t mapDataType;  // CUtensorMapDataType
    // The kernel that takes the forward kernel's place for at most smallQueries queries on smallKeys keys.
    int32_t smallQueries;
    int32_t smallKeys;
    int32_t smallThreads;
    int32_t smallSharedBytes;
};

struct KernelEntry {
    char const* name;
    KernelKind kind;
    contract::Op op;
    int32_t arch;  // 10 * major + minor
    contract::DataType type;
    int32_t headDim;   // 0: any
    int32_t entropy;   // kENTROPY_NONE, kENTROPY_MEAN; -1: does not apply
    int32_t tile;      // kWIDE, kNARROW; -1: does not apply
    int32_t split;     // 1: writes parts for the merge kernel
    int32_t headsPad;  // heads that fit; 0: does not apply
    int32_t block;     // tokens that fit; 0: does not apply
    int32_t unit;      // the width is a multiple of this; 0: does not apply
    int32_t cache;     // of restore: 0 scatters only, 1 takes at most 2 x 2 cells of the cache, 2 any number
    char const* symbol;
    char const* finishSymbol;  // further kernels in the cubin, or empty
    char const* smallSymbol;
    int32_t threads;
    int32_t sharedBytes;
    int32_t perProgram[3];  // how much of each grid size one program covers
    HopperBuild hopper;
    unsigned char const* image;
    size_t imageBytes;
};

struct TileEntry {
    int32_t arch;
    contract::DataType type;
    int32_t headDim;
    int32_t tile;
    int32_t blockM;
    int32_t blockN;
};

// The index: kernels, and the tables of kernels/tuning.py.
struct KernelTable {
    int32_t nbEntries;
    KernelEntry const* entries;
    int32_t nbTiles;
    TileEntry const* tiles;
    int32_t wideFillPercent;
    int32_t slotsPerSm;
    int32_t minKeysPerSplit;
    int32_t maxSplits;
    int32_t maxHeads;
};

KernelTable const& kernelTable() noexcept;

}  // namespace toprovar
