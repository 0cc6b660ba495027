// Errors as the runtime carries them: an OrtStatus with a sentence, or null.
#pragma once

#include "ort_abi.hpp"

namespace sage_ort {

// A sentence about this operator, formatted as by printf.
__attribute__((format(printf, 3, 4))) OrtStatus* refuse(const OrtApi& api, OrtErrorCode code,
                                                        const char* format, ...);

}  // namespace sage_ort

// Returns the status of an expression from the calling function, unless it succeeded.
#define SAGE_ORT_TRY(expression) \
    if (::sage_ort::OrtStatus* failed = (expression)) return failed
