#include "safetensors.hpp"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "error.hpp"

namespace toprovar::runtime {

namespace {

constexpr uint64_t kMOST_HEADER_BYTES = 100'000'000;  // as the reference implementation
constexpr uint64_t kMOST_ELEMENTS = uint64_t{1} << 40;

DType typeOf(std::string const& name) {
    static std::map<std::string, DType> const types{{"F32", DType::kFLOAT32},   {"F16", DType::kFLOAT16},
                                                    {"BF16", DType::kBFLOAT16}, {"I32", DType::kINT32},
                                                    {"I64", DType::kINT64},     {"BOOL", DType::kBOOL}};
    auto const found = types.find(name);
    if (found == types.end()) {
        throw Error(text("element type ", name, "; valid are F32, F16, BF16, I32, I64 and BOOL"));
    }
    return found->second;
}

HostTensor describeTensor(nlohmann::json const& entry, uint64_t dataBytes, uint64_t& begin) {
    HostTensor tensor;
    tensor.type = typeOf(entry.at("dtype").get<std::string>());
    uint64_t elements = 1;
    for (nlohmann::json const& size : entry.at("shape")) {
        auto const value = size.get<uint64_t>();
        if (!size.is_number_unsigned() || value > kMOST_ELEMENTS ||
            elements > kMOST_ELEMENTS / std::max<uint64_t>(value, 1)) {
            throw Error("a size that is negative or too large");
        }
        elements *= value;
        tensor.shape.push_back(static_cast<int64_t>(value));
    }
    nlohmann::json const& offsets = entry.at("data_offsets");
    if (offsets.size() != 2 || !offsets[0].is_number_unsigned() || !offsets[1].is_number_unsigned()) {
        throw Error("data_offsets that are not two numbers");
    }
    begin = offsets[0].get<uint64_t>();
    auto const end = offsets[1].get<uint64_t>();
    if (begin > end || end > dataBytes || end - begin != elements * sizeOf(tensor.type)) {
        throw Error(text("bytes ", begin, " to ", end, " of ", dataBytes, ", where ", elements * sizeOf(tensor.type),
                         " bytes belong"));
    }
    return tensor;
}

}  // namespace

std::vector<float> HostTensor::floats() const {
    std::vector<float> values(count());
    toFloat(bytes.data(), values.size(), type, values.data());
    return values;
}

std::vector<int64_t> HostTensor::integers() const {
    std::vector<int64_t> values(count());
    for (size_t i = 0; i < values.size(); ++i) {
        if (type == DType::kINT64) {
            std::memcpy(&values[i], bytes.data() + 8 * i, 8);
        } else if (type == DType::kINT32) {
            int32_t value = 0;
            std::memcpy(&value, bytes.data() + 4 * i, 4);
            values[i] = value;
        } else {
            throw Error(text("a tensor is ", nameOf(type), " where int32 or int64 is valid; export again"));
        }
    }
    return values;
}

std::map<std::string, HostTensor> readSafetensors(std::filesystem::path const& path) {
    std::error_code failed;
    uint64_t const fileBytes = std::filesystem::file_size(path, failed);
    std::ifstream file(path, std::ios::binary);
    if (failed || !file) {
        throw Error(text(path.string(), ": cannot be read; check that it exists and may be read"));
    }
    uint8_t prefix[8] = {};
    file.read(reinterpret_cast<char*>(prefix), sizeof(prefix));
    uint64_t headerBytes = 0;
    for (int i = 7; i >= 0; --i) {
        headerBytes = headerBytes << 8 | prefix[i];
    }
    if (!file || headerBytes > kMOST_HEADER_BYTES || headerBytes > fileBytes - sizeof(prefix)) {
        throw Error(text(path.string(), ": is no safetensors file: its header does not fit into its ", fileBytes,
                         " bytes; copy it again"));
    }
    std::string header(headerBytes, '\0');
    file.read(header.data(), static_cast<std::streamsize>(headerBytes));
    uint64_t const dataBegin = sizeof(prefix) + headerBytes;
    std::map<std::string, HostTensor> tensors;
    try {
        auto const document = nlohmann::json::parse(header);
        if (!document.is_object()) {
            throw Error("its header is no JSON object");
        }
        for (auto const& [name, entry] : document.items()) {
            if (name == "__metadata__") {
                continue;
            }
            try {
                uint64_t begin = 0;
                HostTensor tensor = describeTensor(entry, fileBytes - dataBegin, begin);
                tensor.bytes.resize(tensor.count() * sizeOf(tensor.type));
                file.seekg(static_cast<std::streamoff>(dataBegin + begin));
                file.read(reinterpret_cast<char*>(tensor.bytes.data()),
                          static_cast<std::streamsize>(tensor.bytes.size()));
                if (!file) {
                    throw Error("it ends early");
                }
                tensors.emplace(name, std::move(tensor));
            } catch (std::exception const& error) {
                throw Error(text("tensor '", name, "': ", error.what()));
            }
        }
    } catch (nlohmann::json::exception const& error) {
        throw Error(text(path.string(), ": is no readable safetensors file: ", error.what(), "; copy it again"));
    } catch (Error const& error) {
        throw Error(text(path.string(), ": is no readable safetensors file: ", error.what(), "; copy it again"));
    }
    return tensors;
}

}  // namespace toprovar::runtime
