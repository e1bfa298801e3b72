// Pieces of the C++ runtime, one call a line on stdin; test_pieces.py compares what comes out with Python.
//   sha256 FILE          noise SEED SCALE COUNT          batchnoise SCALE TOKENS LOGITS SEED...
//   half VALUE...        bfloat VALUE...                 safetensors FILE          png FILE HEIGHT WIDTH
//   bundle FOLDER

#include <cstdio>
#include <cstring>
#include <iostream>
#include <sstream>

#include "bundle.hpp"
#include "error.hpp"
#include "noise_ahead.hpp"
#include "png.hpp"
#include "safetensors.hpp"
#include "sha256.hpp"
#include "toprovar/noise.hpp"

namespace {

using namespace toprovar::runtime;

void printFloats(std::vector<float> const& values) {
    for (float const value : values) {
        std::printf("%a ", static_cast<double>(value));
    }
    std::printf("\n");
}

void run(std::string const& line) {
    std::istringstream words(line);
    std::string call;
    words >> call;
    if (call == "sha256") {
        std::string path;
        words >> path;
        std::printf("%s\n", sha256File(path).c_str());
    } else if (call == "noise") {
        uint64_t seed = 0;
        uint32_t scale = 0;
        size_t count = 0;
        words >> seed >> scale >> count;
        std::vector<float> values(count);
        toprovar::scaleNoise(&seed, 1, scale, 0, count, 1, values.data());
        printFloats(values);
    } else if (call == "batchnoise") {
        uint32_t scale = 0;
        size_t tokens = 0;
        size_t logits = 0;
        words >> scale >> tokens >> logits;
        std::vector<uint64_t> seeds;
        for (uint64_t seed = 0; words >> seed;) {
            seeds.push_back(seed);
        }
        std::vector<float> values(tokens * seeds.size() * logits);
        NoiseAhead drawn(seeds, logits, {{scale, tokens, values.data()}});
        drawn.wait(0);
        printFloats(values);
    } else if (call == "half" || call == "bfloat") {
        DType const type = call == "half" ? DType::kFLOAT16 : DType::kBFLOAT16;
        for (std::string word; words >> word;) {
            float const value = std::strtof(word.c_str(), nullptr);
            uint16_t bits = 0;
            float back = 0;
            fromFloat(&value, 1, type, &bits);
            toFloat(&bits, 1, type, &back);
            std::printf("%04x %a ", bits, static_cast<double>(back));
        }
        std::printf("\n");
    } else if (call == "safetensors") {
        std::string path;
        words >> path;
        for (auto const& [name, tensor] : readSafetensors(path)) {
            std::printf("%s %s %s %s; ", name.c_str(), nameOf(tensor.type), describe(tensor.shape).c_str(),
                        sha256(tensor.bytes.data(), tensor.bytes.size()).c_str());
        }
        std::printf("\n");
    } else if (call == "png") {
        std::string path;
        int64_t height = 0;
        int64_t width = 0;
        words >> path >> height >> width;
        std::vector<float> image(static_cast<size_t>(3 * height * width));
        for (size_t i = 0; i < image.size(); ++i) {
            image[i] = static_cast<float>(i % 307) / 300.F - 0.01F;  // also below 0 and above 1
        }
        writePng(path, toBytes(image.data(), height, width).data(), height, width);
        std::printf("written\n");
    } else if (call == "bundle") {
        std::string path;
        words >> path;
        Bundle const bundle(path);
        std::printf("%s %zu files %zu spans %s\n", bundle.manifest().name.c_str(), bundle.manifest().files.size(),
                    bundle.manifest().nbSpans(), bundle.manifestSha256().c_str());
    }
}

}  // namespace

int main() {
    for (std::string line; std::getline(std::cin, line);) {
        try {
            run(line);
        } catch (Error const& error) {
            std::printf("error: %s\n", error.what());
        }
    }
    return 0;
}
