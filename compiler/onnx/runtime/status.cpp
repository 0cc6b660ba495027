#include "status.hpp"

#include <stdarg.h>
#include <stdio.h>

namespace sage_ort {

OrtStatus* refuse(const OrtApi& api, OrtErrorCode code, const char* format, ...) {
    char message[640];
    int used = snprintf(message, sizeof message, "ai.sage::Attention: ");
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message + used, sizeof message - size_t(used), format, arguments);
    va_end(arguments);
    return api.CreateStatus(code, message);
}

}  // namespace sage_ort
