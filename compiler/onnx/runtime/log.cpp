#include "log.hpp"

#include <stdarg.h>
#include <stdio.h>

namespace sage_ort {
namespace {

// Whatever becomes of a log, no session fails for it.
bool succeeded(const OrtApi& api, OrtStatus* status) {
    if (status == nullptr) return true;
    api.ReleaseStatus(status);
    return false;
}

}  // namespace

Log open_log(const OrtApi& api, const OrtKernelInfo* info) {
    Log log = {&api, nullptr, ""};
    if (!succeeded(api, api.KernelInfo_GetLogger(info, &log.logger))) log.logger = nullptr;
    size_t bytes = sizeof log.node;
    if (!succeeded(api, api.KernelInfo_GetNodeName(info, log.node, &bytes))) log.node[0] = '\0';
    return log;
}

void warn(const Log& log, const char* format, ...) {
    if (log.logger == nullptr) return;
    char message[1280];
    const int used =
        snprintf(message, sizeof message, "ai.sage::Attention: node \"%s\" ", log.node);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message + used, sizeof message - size_t(used), format, arguments);
    va_end(arguments);
    succeeded(*log.api, log.api->Logger_LogMessage(log.logger, ORT_LOGGING_LEVEL_WARNING, message,
                                                   __FILE__, __LINE__, __func__));
}

}  // namespace sage_ort
