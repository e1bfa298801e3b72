// The loop over scales: all that a runtime does outside the graphs. Mirrors runtime/binding.py and runtime/loop.py.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "noise_ahead.hpp"
#include "target.hpp"

namespace toprovar::runtime {

// Milliseconds of one scale: how long its noise held it up (a thread draws it ahead), the transformer, and what leads
// to the next scale.
struct ScaleTiming {
    int64_t scale = 0;
    double noiseMs = 0;
    double stepMs = 0;
    double advanceMs = 0;
};

// Milliseconds of one batch; totalMs is wall time from the condition to the pictures in host memory.
struct Timing {
    double prefixMs = 0;
    std::vector<ScaleTiming> scales;
    double decodeMs = 0;
    double totalMs = 0;

    double transformerMs() const noexcept;
};

// By scale, each [B, N] or [B, N, bits].
using Tokens = std::map<int64_t, std::vector<int64_t>>;

// Shaped like tokens: by how much the logits of a token that was followed must rise until it is drawn, as a part of the
// scale's largest logit; 0 where it is, infinity where none of the parts tried will do: the powers of two between these
// (runtime/loop.py: MARGINS).
using Margins = std::map<int64_t, std::vector<double>>;
constexpr double kSMALLEST_MARGIN = 1.0 / 4096;
constexpr double kWIDEST_MARGIN = 1.0 / 8;

// What one batch gave: tokens by scale, and margins of a run that followed others; codes [B, Cv, h, w]; images
// [B, 3, height, width].
struct Trace {
    Tokens tokens;
    Margins margins;
    std::vector<float> codes;
    std::vector<float> images;
    Timing timing;
};

// Inputs of prefix, in float or integer form; sizes are those of the batch.
struct Condition {
    std::vector<int32_t> labels;       // [B]
    std::vector<float> textFeatures;   // [B, T, text_width]
    std::vector<int32_t> textLengths;  // [B]
};

// A bundle on a target at one batch size. Throws Error where graphs and loop do not fit together.
class Loop {
public:
    Loop(Bundle const& bundle, Target& target, int64_t batch);

    // Makes B pictures; `seeds` has one per image. The host waits for the device after every graph, so that each is
    // timed. With `follow`, each scale still gives its own tokens, but those of `follow` are what is added to the codes
    // and what the next scale is shown.
    Trace run(std::string const& promptClass, Condition const& condition, std::vector<uint64_t> const& seeds,
              Tokens const* follow = nullptr);

    int64_t batch() const noexcept { return batch_; }

private:
    struct Turn {
        int64_t scale = 0;
        bool hasNoise = false;
        Buffer noise;
        Run step;
        Run advance;
        Buffer logits;
        Buffer tokens;
    };

    void allocate();
    void allocateContext();
    void uploadConstants();
    Turn bindTurn(size_t index, ScaleStep const& step, int64_t following, bool filled);
    Run bind(std::string const& graph, Buffers const& inputs, Buffers const& outputs);
    Buffers take(std::string const& graph, std::vector<TensorInfo> const& tensors, Buffers const& from,
                 char const* kind) const;
    Buffer reserve(DType type, Shape const& shape);
    Buffer codes(size_t turn) const;
    Buffer x(int64_t tokens) const;
    int64_t cached(ScaleStep const& step) const;
    void writeFloats(std::string const& name, std::vector<float> const& values);
    void writeIntegers(std::string const& name, std::vector<int32_t> const& values);
    void writeLogits(Turn const& turn, std::vector<float> const& values);
    std::vector<float> chosen(Turn const& turn, std::vector<int64_t> const& tokens) const;
    std::vector<double> margins(Turn const& turn, std::vector<int64_t> const& tokens, std::vector<int64_t> const& drawn,
                                std::vector<float> const& chosen);
    std::vector<int64_t> readTokens(Turn const& turn);
    std::vector<float> readFloats(Buffer const& buffer);
    double measured(Run const& run);
    std::vector<NoiseAhead::Piece> noisePieces(std::vector<Turn> const& turns);

    Bundle const& bundle_;
    Target& target_;
    Manifest const& manifest_;
    int64_t batch_;
    int64_t rows_;
    Buffers buffers_;
    Buffers constants_;
    Buffers context_;
    Run prefix_;
    Run decode_[2];
    std::map<std::string, std::vector<Turn>> turns_;
};

}  // namespace toprovar::runtime
