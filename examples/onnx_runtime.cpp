// Runs a model with ai.sage::Attention in ONNX Runtime, without Python: a session loads the
// operator library by its path. The model has float inputs query, key and value of one shape and an
// output "output"; the program fills them, runs it, and prints the mean of the output.
//
//     c++ -std=c++17 onnx_runtime.cpp -I$ORT/include -L$ORT/lib -lonnxruntime -o onnx_runtime
//     ./onnx_runtime model.onnx libsage_ort.so 1 8 128 64
//
// $ORT is an unpacked release of ONNX Runtime, 1.21 or newer. The library is in the wheel:
// sage_compiler/onnx/runtime/libsage_ort.so.

#include <onnxruntime_c_api.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

// The version that the header is of may be newer than the runtime that is loaded.
constexpr uint32_t kApiVersion = 21;
const OrtApi* api;

void check(OrtStatus* status) {
    if (status == nullptr) return;
    std::fprintf(stderr, "error: %s\n", api->GetErrorMessage(status));
    api->ReleaseStatus(status);
    std::exit(1);
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 7) {
        std::fprintf(stderr, "usage: %s MODEL LIBRARY BATCH HEADS LENGTH HEAD_DIM\n", arguments[0]);
        return 2;
    }
    api = OrtGetApiBase()->GetApi(kApiVersion);
    if (api == nullptr) {
        std::fprintf(stderr, "error: this ONNX Runtime is older than 1.21\n");
        return 1;
    }

    OrtEnv* environment;
    check(api->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "example", &environment));
    OrtSessionOptions* options;
    check(api->CreateSessionOptions(&options));
    check(api->RegisterCustomOpsLibrary_V2(options, arguments[2]));
    OrtSession* session;
    check(api->CreateSession(environment, arguments[1], options, &session));

    int64_t shape[4], elements = 1;
    for (int i = 0; i < 4; ++i) {
        shape[i] = std::atoll(arguments[3 + i]);
        elements *= shape[i];
    }
    OrtMemoryInfo* memory;
    check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
    const char* const inputs[] = {"query", "key", "value"};
    std::vector<float> data[3];
    OrtValue* tensors[3];
    for (int i = 0; i < 3; ++i) {
        for (int64_t j = 0; j < elements; ++j) data[i].push_back(std::sin(float(j + i)));
        check(api->CreateTensorWithDataAsOrtValue(
            memory, data[i].data(), data[i].size() * sizeof(float), shape, 4,
            ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &tensors[i]));
    }

    const char* const outputs[] = {"output"};
    OrtValue* output = nullptr;
    check(api->Run(session, nullptr, inputs, tensors, 3, outputs, 1, &output));
    void* result;
    check(api->GetTensorMutableData(output, &result));
    double sum = 0;
    for (int64_t j = 0; j < elements; ++j) sum += static_cast<float*>(result)[j];
    std::printf("mean %.6f\n", sum / double(elements));

    api->ReleaseValue(output);
    for (OrtValue* tensor : tensors) api->ReleaseValue(tensor);
    api->ReleaseMemoryInfo(memory);
    api->ReleaseSession(session);
    api->ReleaseSessionOptions(options);
    api->ReleaseEnv(environment);
}
