/* ONNX Runtime's operator library for ai.sage::Attention: what it exports.
 *
 * Sessions load it by its path, with session_options.register_custom_ops_library in Python and
 * RegisterCustomOpsLibrary_V2 in C; docs/onnx-runtime.md shows it. The functions below tell what it
 * is, without a runtime.
 */
#ifndef SAGE_ORT_H
#define SAGE_ORT_H

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define SAGE_ORT_EXPORT __declspec(dllexport)
#else
#define SAGE_ORT_EXPORT __attribute__((visibility("default")))
#endif

/* What ONNX Runtime calls: OrtStatus* (OrtSessionOptions*, const OrtApiBase*). */
SAGE_ORT_EXPORT void* RegisterCustomOps(void* options, const void* api_base);

/* The version of the package that this library is from. */
SAGE_ORT_EXPORT const char* sage_ort_version(void);

/* What serves a recipe on an execution provider ("CPUExecutionProvider"): the name of a recipe, or
 * "float" for float arithmetic; for "auto", what large calls get. On "CUDAExecutionProvider" it is
 * NULL for "auto", which depends on the device; "exact" is computed by the CPU there. NULL where
 * the provider or the recipe is unknown. */
SAGE_ORT_EXPORT const char* sage_ort_served(const char* provider, const char* recipe);

/* "" where there are operators for CUDAExecutionProvider; else why there are none, in a sentence
 * that says what to do: no driver, or no kernel pack that can be used. Looks for both as
 * registration does. The text is the thread's, until it asks again. */
SAGE_ORT_EXPORT const char* sage_ort_cuda_state(void);

#ifdef __cplusplus
}
#endif

#endif
