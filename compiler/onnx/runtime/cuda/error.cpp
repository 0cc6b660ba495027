#include "error.hpp"

#include <stdarg.h>
#include <stdio.h>

namespace sage_cuda {

bool Error::set(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return false;
}

}  // namespace sage_cuda
