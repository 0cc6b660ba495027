// What this library uses of ONNX Runtime's C API, version 21: its layout and no more.
//
// The API is a table of functions that only ever grows at its end, handed out by version, and an
// operator is a struct of callbacks that says which version of itself it is. So a place in the
// table is a fact that a later runtime cannot change; every place used here is asserted below and
// exercised by the tests with an old and a new runtime. docs/onnx-runtime.md says how to add one.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace sage_ort {

constexpr uint32_t kApiVersion = 21;

struct OrtStatus;  // null: success
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtTensorTypeAndShapeInfo;
struct OrtValue;
struct OrtMemoryInfo;
struct OrtLogger;
struct OrtApi;
struct OrtCustomOp;

enum OrtErrorCode : int {
    ORT_FAIL = 1,
    ORT_INVALID_ARGUMENT = 2,
    ORT_NOT_IMPLEMENTED = 9,
    ORT_INVALID_GRAPH = 10,
};

enum ElementType : int {
    kUndefined = 0,  // of an operator's input: any
    kFloat32 = 1,
    kBool = 9,
    kFloat16 = 10,
    kBFloat16 = 16,
};

enum OrtLoggingLevel : int { ORT_LOGGING_LEVEL_WARNING = 2 };
enum OrtMemType : int { kMemoryCpuInput = -2, kMemoryDefault = 0 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };

struct OrtApiBase {
    const OrtApi* (*GetApi)(uint32_t version);  // null: the runtime is older than that
    const char* (*GetVersionString)();
};

struct OrtAllocator {
    uint32_t version;
    void* (*Alloc)(OrtAllocator*, size_t bytes);
    void (*Free)(OrtAllocator*, void* memory);
    // Of the memory that it gives; belongs to the allocator.
    const OrtMemoryInfo* (*Info)(const OrtAllocator*);
};

struct OrtApi {
    // Copies the message.
    OrtStatus* (*CreateStatus)(OrtErrorCode, const char* message);
    void* unused_1[25];
    OrtStatus* (*CreateCustomOpDomain)(const char* domain, OrtCustomOpDomain**);
    OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain*, const OrtCustomOp*);
    OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions*, OrtCustomOpDomain*);
    void* unused_29[22];
    OrtStatus* (*GetTensorMutableData)(OrtValue*, void** data);
    void* unused_52[5];
    OrtStatus* (*CreateTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo**);
    OrtStatus* (*SetTensorElementType)(OrtTensorTypeAndShapeInfo*, ElementType);
    OrtStatus* (*SetDimensions)(OrtTensorTypeAndShapeInfo*, const int64_t* dims, size_t rank);
    OrtStatus* (*GetTensorElementType)(const OrtTensorTypeAndShapeInfo*, ElementType*);
    OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo*, size_t* rank);
    OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo*, int64_t* dims, size_t rank);
    // The names belong to the info; "" for a dim that has none.
    OrtStatus* (*GetSymbolicDimensions)(const OrtTensorTypeAndShapeInfo*, const char** names,
                                        size_t rank);
    void* unused_64;
    OrtStatus* (*GetTensorTypeAndShape)(const OrtValue*, OrtTensorTypeAndShapeInfo**);
    void* unused_66[6];
    // The ordinal of a device.
    OrtStatus* (*MemoryInfoGetId)(const OrtMemoryInfo*, int* id);
    void* unused_73[12];
    OrtStatus* (*KernelInfoGetAttribute_float)(const OrtKernelInfo*, const char* name, float*);
    OrtStatus* (*KernelInfoGetAttribute_int64)(const OrtKernelInfo*, const char* name, int64_t*);
    // Without memory it only tells the bytes, the terminating zero included.
    OrtStatus* (*KernelInfoGetAttribute_string)(const OrtKernelInfo*, const char* name, char*,
                                                size_t* bytes);
    void* unused_88[2];
    // Null for an optional one that is not given.
    OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext*, size_t index, const OrtValue**);
    OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext*, size_t index, const int64_t* dims,
                                          size_t rank, OrtValue**);
    void* unused_92;
    void (*ReleaseStatus)(OrtStatus*);
    void* unused_94[5];
    void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo*);
    void* unused_100;
    void (*ReleaseCustomOpDomain)(OrtCustomOpDomain*);
    void* unused_102[30];
    void (*ReleaseAllocator)(OrtAllocator*);
    void* unused_133[29];
    // Without memory they only tell the number of elements.
    OrtStatus* (*KernelInfoGetAttributeArray_float)(const OrtKernelInfo*, const char* name, float*,
                                                    size_t* count);
    OrtStatus* (*KernelInfoGetAttributeArray_int64)(const OrtKernelInfo*, const char* name,
                                                    int64_t*, size_t* count);
    void* unused_164[29];
    // A cudaStream_t, which is a CUstream.
    OrtStatus* (*KernelContext_GetGPUComputeStream)(const OrtKernelContext*, void** stream);
    void* unused_194[50];
    // Without memory it only tells the bytes, the terminating zero included.
    OrtStatus* (*KernelInfo_GetNodeName)(const OrtKernelInfo*, char*, size_t* bytes);
    // The session's, which outlives its kernels.
    OrtStatus* (*KernelInfo_GetLogger)(const OrtKernelInfo*, const OrtLogger**);
    void* unused_246;
    OrtStatus* (*Logger_LogMessage)(const OrtLogger*, OrtLoggingLevel, const char* message,
                                    const char* file, int line, const char* function);
    void* unused_248[20];
    // The info belongs to the context.
    OrtStatus* (*ShapeInferContext_GetInputTypeShape)(const OrtShapeInferContext*, size_t index,
                                                      OrtTensorTypeAndShapeInfo**);
    void* unused_269;
    OrtStatus* (*ShapeInferContext_SetOutputTypeShape)(const OrtShapeInferContext*, size_t index,
                                                       const OrtTensorTypeAndShapeInfo*);
    OrtStatus* (*SetSymbolicDimensions)(OrtTensorTypeAndShapeInfo*, const char** names,
                                        size_t rank);
    void* unused_272[2];
    // body(argument, index) for every index below total, on the session's threads. With no batches
    // a thread takes one index after the other.
    OrtStatus* (*KernelContext_ParallelFor)(const OrtKernelContext*,
                                            void (*body)(void* argument, size_t index),
                                            size_t total, size_t batches, void* argument);
    void* unused_275[2];
    // Memory for what runs on the context's stream; whoever asked frees it, by an allocator of the
    // same memory. Unlike the other entries it throws where there is none.
    OrtStatus* (*KernelContext_GetScratchBuffer)(const OrtKernelContext*, const OrtMemoryInfo*,
                                                 size_t bytes, void** memory);
    OrtStatus* (*KernelInfoGetAllocator)(const OrtKernelInfo*, OrtMemType, OrtAllocator**);
};

#define SAGE_ORT_PLACE(entry, place)                                  \
    static_assert(offsetof(OrtApi, entry) == (place) * sizeof(void*), \
                  #entry " is at another place of the runtime's table")
SAGE_ORT_PLACE(CreateStatus, 0);
SAGE_ORT_PLACE(CreateCustomOpDomain, 26);
SAGE_ORT_PLACE(CustomOpDomain_Add, 27);
SAGE_ORT_PLACE(AddCustomOpDomain, 28);
SAGE_ORT_PLACE(GetTensorMutableData, 51);
SAGE_ORT_PLACE(CreateTensorTypeAndShapeInfo, 57);
SAGE_ORT_PLACE(SetTensorElementType, 58);
SAGE_ORT_PLACE(SetDimensions, 59);
SAGE_ORT_PLACE(GetTensorElementType, 60);
SAGE_ORT_PLACE(GetDimensionsCount, 61);
SAGE_ORT_PLACE(GetDimensions, 62);
SAGE_ORT_PLACE(GetSymbolicDimensions, 63);
SAGE_ORT_PLACE(GetTensorTypeAndShape, 65);
SAGE_ORT_PLACE(MemoryInfoGetId, 72);
SAGE_ORT_PLACE(KernelInfoGetAttribute_float, 85);
SAGE_ORT_PLACE(KernelInfoGetAttribute_int64, 86);
SAGE_ORT_PLACE(KernelInfoGetAttribute_string, 87);
SAGE_ORT_PLACE(KernelContext_GetInput, 90);
SAGE_ORT_PLACE(KernelContext_GetOutput, 91);
SAGE_ORT_PLACE(ReleaseStatus, 93);
SAGE_ORT_PLACE(ReleaseTensorTypeAndShapeInfo, 99);
SAGE_ORT_PLACE(ReleaseCustomOpDomain, 101);
SAGE_ORT_PLACE(ReleaseAllocator, 132);
SAGE_ORT_PLACE(KernelInfoGetAttributeArray_float, 162);
SAGE_ORT_PLACE(KernelInfoGetAttributeArray_int64, 163);
SAGE_ORT_PLACE(KernelContext_GetGPUComputeStream, 193);
SAGE_ORT_PLACE(KernelInfo_GetNodeName, 244);
SAGE_ORT_PLACE(KernelInfo_GetLogger, 245);
SAGE_ORT_PLACE(Logger_LogMessage, 247);
SAGE_ORT_PLACE(ShapeInferContext_GetInputTypeShape, 268);
SAGE_ORT_PLACE(ShapeInferContext_SetOutputTypeShape, 270);
SAGE_ORT_PLACE(SetSymbolicDimensions, 271);
SAGE_ORT_PLACE(KernelContext_ParallelFor, 274);
SAGE_ORT_PLACE(KernelContext_GetScratchBuffer, 277);
SAGE_ORT_PLACE(KernelInfoGetAllocator, 278);
#undef SAGE_ORT_PLACE

// An operator, as of version 21 of the API. Callbacks that are null are not called.
struct OrtCustomOp {
    uint32_t version;
    void* unused_CreateKernel;
    const char* (*GetName)(const OrtCustomOp*);
    const char* (*GetExecutionProviderType)(const OrtCustomOp*);
    ElementType (*GetInputType)(const OrtCustomOp*, size_t index);
    size_t (*GetInputTypeCount)(const OrtCustomOp*);
    ElementType (*GetOutputType)(const OrtCustomOp*, size_t index);
    size_t (*GetOutputTypeCount)(const OrtCustomOp*);
    void* unused_KernelCompute;
    void (*KernelDestroy)(void* kernel);
    Characteristic (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);
    Characteristic (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
    OrtMemType (*GetInputMemoryType)(const OrtCustomOp*, size_t index);
    int (*GetVariadicInputMinArity)(const OrtCustomOp*);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
    OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*,
                                 void** kernel);
    OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
    OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
    int (*GetStartVersion)(const OrtCustomOp*);
    int (*GetEndVersion)(const OrtCustomOp*);
    void* unused_inplace[4];
};

}  // namespace sage_ort
