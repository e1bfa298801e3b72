// clang-format off
// Written by `python -m toprovar.plugins.contract_header` from kernels/contract.py. Do not edit.
#pragma once

#include <cstddef>
#include <cstdint>

namespace toprovar::contract {

inline constexpr int32_t kCONTRACT_VERSION = 1;
inline constexpr int32_t kKERNEL_REVISION = 3;
inline constexpr char const* kDOMAIN = "toprovar";
inline constexpr char const* kPLUGIN_NAMESPACE = "toprovar";
inline constexpr char const* kPLUGIN_VERSION = "1";
inline constexpr int32_t kMAX_HEAD_DIM = 128;
inline constexpr int32_t kMAX_SELECT_TOKENS = 16384;
inline constexpr int32_t kHEAD_DIMS[] = {64, 80, 96, 128};

// Values are those of onnx.TensorProto.DataType. kANY stands for T: any of kT_TYPES, the same for every T of a node.
enum class DataType : int32_t {
    kANY = 0,
    kFLOAT32 = 1,
    kINT32 = 6,
    kFLOAT16 = 10,
    kBFLOAT16 = 16,
};
inline constexpr DataType kT_TYPES[] = {DataType::kFLOAT16, DataType::kBFLOAT16, DataType::kFLOAT32};

constexpr size_t sizeOf(DataType type) {
    switch (type) {
        case DataType::kFLOAT32: return 4;
        case DataType::kINT32: return 4;
        case DataType::kFLOAT16: return 2;
        case DataType::kBFLOAT16: return 2;
        case DataType::kANY: break;
    }
    return 0;
}

constexpr char const* nameOf(DataType type) {
    switch (type) {
        case DataType::kFLOAT32: return "float32";
        case DataType::kINT32: return "int32";
        case DataType::kFLOAT16: return "float16";
        case DataType::kBFLOAT16: return "bfloat16";
        case DataType::kANY: break;
    }
    return "T";
}

inline constexpr int32_t kMAX_RANK = 4;

// One input or output; equal axis names are equal sizes.
struct TensorSpec {
    char const* name;
    DataType type;
    int32_t rank;
    char const* axes[kMAX_RANK];
};

enum class AttributeKind : int32_t { kFLOAT, kINT };

struct AttributeSpec {
    char const* name;
    AttributeKind kind;
    bool required;
    double defaultValue;
    int32_t nbChoices;  // 0: any value
    int32_t choices[4];
};

enum class Op : int32_t {
    kENTROPY_ATTENTION,
    kSELECT_TOKENS,
    kGATHER_TOKENS,
    kSCATTER_TOKENS,
    kRESTORE_TOKENS,
};

// Attention over two pieces of keys with the entropy of every query, in one pass.
namespace entropy_attention {
enum Input : int32_t { kQ, kPAST_K, kPAST_V, kNEW_K, kNEW_V };
enum Output : int32_t { kOUT_OUT, kENTROPY_OUT };
enum Attribute : int32_t { kSCALE_ATTR, kENTROPY_ATTR };
inline constexpr TensorSpec kINPUTS[] = {
    {"q", DataType::kANY, 4, {"N", "R", "H", "D"}},  // queries, any subset of the scale's tokens
    {"past_k", DataType::kANY, 4, {"P", "R", "H", "D"}},  // keys of earlier scales; P may be 0
    {"past_v", DataType::kANY, 4, {"P", "R", "H", "D"}},  // values of earlier scales
    {"new_k", DataType::kANY, 4, {"L", "R", "H", "D"}},  // keys of this scale, behind the past ones
    {"new_v", DataType::kANY, 4, {"L", "R", "H", "D"}},  // values of this scale
};
inline constexpr TensorSpec kOUTPUTS[] = {
    {"out", DataType::kANY, 4, {"N", "R", "H", "D"}},  // softmax(scale * q.k) v over past then new keys, no mask
    {"entropy", DataType::kFLOAT32, 2, {"R", "N"}},  // -sum p log p in nats over all keys, mean over heads
};
}  // namespace entropy_attention

// The K lowest of N; equal values go to the lower index, NaN counts as highest; ascending by index.
namespace select_tokens {
enum Input : int32_t { kENTROPY, kKEEP_SLOTS };
enum Output : int32_t { kINDICES_OUT };
inline constexpr TensorSpec kINPUTS[] = {
    {"entropy", DataType::kFLOAT32, 2, {"B", "N"}},  // score of every token; the lowest are kept
    {"keep_slots", DataType::kINT32, 1, {"K"}},  // only its length counts: it carries K into a graph
};
inline constexpr TensorSpec kOUTPUTS[] = {
    {"indices", DataType::kINT32, 2, {"B", "K"}},  // kept tokens of each image, ascending, each at most once; row r uses r % B
};
}  // namespace select_tokens

// kept[k, r] = x[indices[r % B, k], r].
namespace gather_tokens {
enum Input : int32_t { kX, kINDICES };
enum Output : int32_t { kKEPT_OUT };
inline constexpr TensorSpec kINPUTS[] = {
    {"x", DataType::kANY, 3, {"N", "R", "C"}},  // tokens of the scale
    {"indices", DataType::kINT32, 2, {"B", "K"}},  // kept tokens of each image, ascending, each at most once; row r uses r % B
};
inline constexpr TensorSpec kOUTPUTS[] = {
    {"kept", DataType::kANY, 3, {"K", "R", "C"}},  // rows of the kept tokens, in the order of `indices`
};
}  // namespace gather_tokens

// A copy of x in which token indices[r % B, k] of row r is kept[k, r].
namespace scatter_tokens {
enum Input : int32_t { kX, kKEPT, kINDICES };
enum Output : int32_t { kY_OUT };
inline constexpr TensorSpec kINPUTS[] = {
    {"x", DataType::kANY, 3, {"N", "R", "C"}},  // tokens of the scale
    {"kept", DataType::kANY, 3, {"K", "R", "C"}},  // rows of the kept tokens, in the order of `indices`
    {"indices", DataType::kINT32, 2, {"B", "K"}},  // kept tokens of each image, ascending, each at most once; row r uses r % B
};
inline constexpr TensorSpec kOUTPUTS[] = {
    {"y", DataType::kANY, 3, {"N", "R", "C"}},  // x with the kept rows written over it
};
}  // namespace scatter_tokens

// y = x + rows . cache . cols^T on the grid, in fp32, rounded once; then the kept rows written over it. rows and cols must be the matrices of area resizing: a kernel may read no more than their shapes.
namespace restore_tokens {
enum Input : int32_t { kX, kKEPT, kINDICES, kCACHE, kROWS, kCOLS };
enum Output : int32_t { kY_OUT };
inline constexpr TensorSpec kINPUTS[] = {
    {"x", DataType::kANY, 3, {"N", "R", "C"}},  // tokens of the scale
    {"kept", DataType::kANY, 3, {"K", "R", "C"}},  // rows of the kept tokens, in the order of `indices`
    {"indices", DataType::kINT32, 2, {"B", "K"}},  // kept tokens of each image, ascending, each at most once; row r uses r % B
    {"cache", DataType::kANY, 3, {"M", "R", "C"}},  // branch output at the cached scale, M = hc * wc, row-major
    {"rows", DataType::kFLOAT32, 2, {"h", "hc"}},  // row matrix of the area resize, hc -> h
    {"cols", DataType::kFLOAT32, 2, {"w", "wc"}},  // column matrix of the area resize, wc -> w
};
inline constexpr TensorSpec kOUTPUTS[] = {
    {"y", DataType::kANY, 3, {"N", "R", "C"}},  // kept rows as given, every other row x + resize(cache)
};
}  // namespace restore_tokens

inline constexpr AttributeSpec kENTROPY_ATTENTION_ATTRIBUTES[] = {
    {"scale", AttributeKind::kFLOAT, true, 0.0, 0, {}},  // softmax scale: 1 for cosine attention, else as the backbone says
    {"entropy", AttributeKind::kINT, false, 1.0, 2, {0, 1}},  // 0: only `out` is computed; 1: also `entropy`
};
inline constexpr AttributeSpec kCACHED_ATTENTION_ATTRIBUTES[] = {
    {"scale", AttributeKind::kFLOAT, true, 0.0, 0, {}},  // softmax scale: 1 for cosine attention, else as the backbone says
    {"entropy", AttributeKind::kINT, false, 0.0, 1, {0}},  // 0: only `out` is computed; 1: also `entropy`
};

inline constexpr int32_t kMAX_ATTRIBUTES = 2;
inline constexpr int32_t kMAX_TENSORS = 7;

// One TensorRT plugin: its name, the op behind it, its tensors and attributes.
struct PluginSpec {
    char const* name;
    Op op;
    int32_t nbInputs;
    TensorSpec const* inputs;
    int32_t nbOutputs;
    TensorSpec const* outputs;
    int32_t nbAttributes;
    AttributeSpec const* attributes;
};

inline constexpr PluginSpec kPLUGINS[] = {
    {"EntropyAttention", Op::kENTROPY_ATTENTION, 5, entropy_attention::kINPUTS, 2, entropy_attention::kOUTPUTS, 2, kENTROPY_ATTENTION_ATTRIBUTES},
    {"CachedAttention", Op::kENTROPY_ATTENTION, 5, entropy_attention::kINPUTS, 1, entropy_attention::kOUTPUTS, 2, kCACHED_ATTENTION_ATTRIBUTES},
    {"SelectTokens", Op::kSELECT_TOKENS, 2, select_tokens::kINPUTS, 1, select_tokens::kOUTPUTS, 0, nullptr},
    {"GatherTokens", Op::kGATHER_TOKENS, 2, gather_tokens::kINPUTS, 1, gather_tokens::kOUTPUTS, 0, nullptr},
    {"ScatterTokens", Op::kSCATTER_TOKENS, 3, scatter_tokens::kINPUTS, 1, scatter_tokens::kOUTPUTS, 0, nullptr},
    {"RestoreTokens", Op::kRESTORE_TOKENS, 6, restore_tokens::kINPUTS, 1, restore_tokens::kOUTPUTS, 0, nullptr},
};
inline constexpr int32_t kNB_PLUGINS = 6;

}  // namespace toprovar::contract
