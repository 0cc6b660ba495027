#include "safe.hpp"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

namespace sage_cuda {
namespace {

constexpr uid_t kAdministrator = 0;

bool check_path(const char* folder, const char* path, bool is_above, Error& error) {
    struct stat status;
    if (stat(path, &status) != 0) return error.set("%s: %s", path, strerror(errno));
    if (status.st_uid != geteuid() && status.st_uid != kAdministrator)
        return error.set(
            "kernels in %s are not safe to load: %s belongs to another user (uid %u); set "
            "SAGE_KERNEL_PACK to a folder of yours that nobody else can write to",
            folder, path, unsigned(status.st_uid));
    const bool others_write = (status.st_mode & (S_IWGRP | S_IWOTH)) != 0;
    if (others_write && !(is_above && (status.st_mode & S_ISVTX) != 0))
        return error.set(
            "kernels in %s are not safe to load: other users can write to %s; chmod go-w %s, or "
            "set SAGE_KERNEL_PACK to a folder of yours that nobody else can write to",
            folder, path, path);
    return true;
}

// A path and all above it, which it is cut down to.
bool check_chain(const char* folder, char* path, Error& error) {
    if (!check_path(folder, path, false, error)) return false;
    for (char* slash = strrchr(path, '/'); slash != nullptr; slash = strrchr(path, '/')) {
        const bool is_root = slash == path;
        slash[is_root ? 1 : 0] = '\0';
        if (!check_path(folder, path, true, error)) return false;
        if (is_root) break;
    }
    return true;
}

}  // namespace

bool check_safe(const char* folder, Error& error) {
    char resolved[PATH_MAX], given[PATH_MAX];
    if (realpath(folder, resolved) == nullptr) return error.set("%s: %s", folder, strerror(errno));
    const bool absolute = folder[0] == '/';
    if (strlen(folder) >= sizeof given) return error.set("%s: its path is too long", folder);
    // A relative path is below the current folder, whose chain the resolved one has.
    strcpy(given, absolute ? folder : resolved);
    size_t length = strlen(given);
    while (length > 1 && given[length - 1] == '/') given[--length] = '\0';
    return check_chain(folder, given, error) && check_chain(folder, resolved, error);
}

}  // namespace sage_cuda
