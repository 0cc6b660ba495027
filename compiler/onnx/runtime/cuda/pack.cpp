#include "pack.hpp"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>

#include "safe.hpp"

namespace sage_cuda {
namespace {

constexpr char kTable[] = "launches.txt";
constexpr char kTitle[] = "sage-launches 8 ";              // with FORMAT of launch_table.py
constexpr char kTemplates[] = SAGE_TEMPLATES_DIGEST "\n";  // by setup.py
constexpr char kEnd[] = "end ";
constexpr char kWordCharacters[] =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_";
constexpr size_t kMostWords = 32;        // of a record
constexpr size_t kMostBytes = 64 << 20;  // of a file: far above any

const char* const kDtypeNames[] = {"float16", "bfloat16", "float32"};
const char* const kRecipeNames[kRecipes] = {"int4_fp8", "int4_fp16", "int8_fp8", "int8_fp16"};

template <size_t kCount>
int find_name(const char* const (&names)[kCount], const char* name) {
    for (size_t i = 0; i < kCount; i++)
        if (strcmp(names[i], name) == 0) return int(i);
    return -1;
}

// The words of one record, taken one by one; once one is not as it must be, all fail.
class Record {
 public:
    Record(char** words, size_t count) : words_(words), count_(count) {}

    Record& number(int64_t& value, int64_t least, int64_t most = INT64_MAX) {
        const char* const word = next();
        char* end = nullptr;
        errno = 0;
        value = strtoll(word, &end, 10);
        if (end == word || *end != '\0' || errno != 0 || value < least || value > most) ok_ = false;
        return *this;
    }

    template <size_t kBytes>
    Record& text(char (&value)[kBytes]) {
        const char* const word = next();
        const size_t length = strlen(word);
        // They become parts of paths and of messages.
        if (length == 0 || length >= kBytes || strspn(word, kWordCharacters) != length) {
            ok_ = false;
            value[0] = '\0';
        } else {
            memcpy(value, word, length + 1);
        }
        return *this;
    }

    template <class Enum, size_t kCount>
    Record& name(Enum& value, const char* const (&names)[kCount]) {
        const int found = find_name(names, next());
        if (found < 0) ok_ = false;
        value = static_cast<Enum>(found < 0 ? 0 : found);
        return *this;
    }

    Record& fail_unless(bool condition) {
        ok_ = ok_ && condition;
        return *this;
    }

    char* next() {
        static char nothing[] = "";
        if (at_ < count_) return words_[at_++];
        ok_ = false;
        return nothing;
    }

    // Whether all was as it must be, and nothing is left.
    bool finished() const { return ok_ && at_ == count_; }

 private:
    char** words_;
    size_t count_, at_ = 0;
    bool ok_ = true;
};

// A whole file, and a terminating zero that does not count.
bool read_file(const char* path, Array<char>& content, Error& error) {
    FILE* const file = fopen(path, "rb");
    if (file == nullptr) return error.set("%s: %s", path, strerror(errno));
    size_t used = 0, got = 0;
    bool memory = content.resize(1 << 16);
    while (memory && (got = fread(content.data() + used, 1, content.size() - used, file)) > 0) {
        used += got;
        if (used == content.size()) memory = used < kMostBytes && content.resize(2 * used);
    }
    const bool failed = ferror(file) != 0;
    fclose(file);
    if (!memory) return error.set("%s: no memory for it", path);
    if (failed) return error.set("%s: it cannot be read", path);
    content[used] = '\0';
    content.resize(used);
    return true;
}

bool parse_recipes(char* list, Arch& arch) {
    arch.recipe_count = 0;
    char* rest = nullptr;
    for (char* name = strtok_r(list, ",", &rest); name != nullptr;
         name = strtok_r(nullptr, ",", &rest)) {
        const int found = find_name(kRecipeNames, name);
        if (found < 0 || arch.recipe_count == kRecipes) return false;
        arch.recipes[arch.recipe_count++] = Recipe(found);
    }
    return arch.recipe_count > 0;
}

// Checks the last line, and takes it off.
bool check_end(char* text, size_t bytes, Error& error) {
    constexpr size_t kEndBytes = sizeof kEnd - 1 + kDigestText + 1;
    char* const end = bytes < kEndBytes ? nullptr : text + bytes - kEndBytes;
    const bool is_whole = end != nullptr && strlen(text) == bytes && text[bytes - 1] == '\n' &&
                          strncmp(end, kEnd, sizeof kEnd - 1) == 0;
    if (!is_whole) return error.set("%s is cut off, or is no launch table", kTable);
    char digest[kDigestText + 1];
    sha256(text, size_t(end - text), digest);
    if (strncmp(end + sizeof kEnd - 1, digest, kDigestText) != 0)
        return error.set("%s: its checksum differs", kTable);
    *end = '\0';
    return true;
}

}  // namespace

const char* name_of(Dtype dtype) { return kDtypeNames[int(dtype)]; }
const char* name_of(Recipe recipe) { return kRecipeNames[int(recipe)]; }

bool Plan::serves(int of_arch, const Choice& choice) const {
    return arch == of_arch && dtype == choice.dtype && recipe == choice.recipe &&
           head_dim[0] <= choice.head_dim && choice.head_dim <= head_dim[1] &&
           value_head_dim[0] <= choice.value_head_dim &&
           choice.value_head_dim <= value_head_dim[1] && (window != 0) == choice.window &&
           (masked != 0) == choice.masked && (softcap != 0) == choice.softcap;
}

bool Pack::open(const char* folder, Error& error) {
    Error reason;
    char path[sizeof folder_ + sizeof kTable + 1];
    if (strlen(folder) >= sizeof folder_)
        return error.set("the kernel pack %.100s...: its path is too long", folder);
    snprintf(folder_, sizeof folder_, "%s", folder);
    snprintf(path, sizeof path, "%s/%s", folder_, kTable);
    Array<char> text;
    if (check_safe(folder, reason) && read_file(path, text, reason) &&
        parse(text.data(), text.size(), reason))
        return true;
    return error.set(
        "the kernel pack %s: %s; build it again with `sagec kernels build --standalone`", folder,
        reason.text);
}

bool Pack::parse(char* text, size_t bytes, Error& error) {
    if (!check_end(text, bytes, error)) return false;
    if (strncmp(text, kTitle, sizeof kTitle - 1) != 0)
        return error.set("%s is not a launch table of the format that this library reads", kTable);
    text += sizeof kTitle - 1;
    if (strncmp(text, kTemplates, sizeof kTemplates - 1) != 0)
        return error.set("its kernels were built from other templates than this library knows");
    int64_t line_number = 1;
    char* rest_of_text = nullptr;
    for (char* line = strtok_r(text + sizeof kTemplates - 1, "\n", &rest_of_text); line != nullptr;
         line = strtok_r(nullptr, "\n", &rest_of_text)) {
        line_number++;
        char* words[kMostWords];
        size_t count = 0;
        char* rest = nullptr;
        for (char* word = strtok_r(line, " ", &rest); word != nullptr && count < kMostWords;
             word = strtok_r(nullptr, " ", &rest))
            words[count++] = word;
        if (!parse_record(words, count))
            return error.set("line %lld of %s is not as it must be",
                             static_cast<long long>(line_number), kTable);
    }
    const int64_t kernels = int64_t(kernels_.size());
    for (const Arch& arch : archs_)
        for (const int64_t kernel : {arch.mask_rows, arch.mask_keys, arch.mask_counts, arch.sinks})
            if (kernel >= kernels) return error.set("%s names kernels that it lacks", kTable);
    for (const Plan& plan : plans_)
        for (const int64_t kernel : {plan.quantize, plan.attend})
            if (kernel >= kernels) return error.set("%s names kernels that it lacks", kTable);
    return true;
}

bool Pack::parse_record(char** words, size_t count) {
    if (count == 0) return false;
    Record record(words + 1, count - 1);
    constexpr int64_t kLargest = int64_t{1} << 31;  // of any size
    if (strcmp(words[0], "arch") == 0) {
        Arch arch = {};
        record.text(arch.name).number(arch.major, 0, 99).number(arch.minor, 0, 99);
        record.fail_unless(parse_recipes(record.next(), arch));
        for (int64_t* kernel : {&arch.mask_rows, &arch.mask_keys, &arch.mask_counts, &arch.sinks})
            record.number(*kernel, kAbsent, kLargest);
        return record.finished() && archs_.push(arch);
    }
    if (strcmp(words[0], "kernel") == 0) {
        Kernel kernel = {};
        record.text(kernel.arch).text(kernel.symbol);
        record.number(kernel.threads, 1, 1024).number(kernel.shared_bytes, 0, 1 << 20);
        record.number(kernel.params_bytes, 1, 4096).number(kernel.image_bytes, 1, kLargest);
        record.text(kernel.sha256);
        return record.finished() && kernels_.push(kernel);
    }
    if (strcmp(words[0], "attention") == 0) {
        Plan plan = {};
        const char* const arch = record.next();
        plan.arch = kAbsent;
        for (size_t i = 0; i < archs_.size(); i++)
            if (strcmp(archs_[i].name, arch) == 0) plan.arch = int(i);
        record.fail_unless(plan.arch != kAbsent);
        record.name(plan.dtype, kDtypeNames).name(plan.recipe, kRecipeNames);
        for (int64_t* dim : {&plan.head_dim[0], &plan.head_dim[1], &plan.value_head_dim[0],
                             &plan.value_head_dim[1]})
            record.number(*dim, 1, 1 << 16);
        for (int64_t* flag : {&plan.window, &plan.masked, &plan.softcap})
            record.number(*flag, 0, 1);
        for (int64_t* kernel : {&plan.quantize, &plan.attend}) record.number(*kernel, 0, kLargest);
        for (int64_t* flag : {&plan.smooths_query, &plan.scales_value, &plan.copies_mask,
                              &plan.persistent, &plan.dependent})
            record.number(*flag, 0, 1);
        record.number(plan.query_tasks, 1, 1 << 16).number(plan.slices, 1, 1 << 16);
        for (int64_t* size : {&plan.padded, &plan.padded_value, &plan.query_tile_bytes,
                              &plan.value_offset, &plan.scales_offset, &plan.tile_bytes})
            record.number(*size, 1, kLargest);
        return record.finished() && plans_.push(plan);
    }
    return false;
}

const Arch* Pack::find_arch(int major, int minor) const {
    for (const Arch& arch : archs_)
        if (arch.major == major && arch.minor == minor) return &arch;
    return nullptr;
}

const Plan* Pack::find(const Arch& arch, const Choice& choice) const {
    const int index = int(&arch - archs_.begin());
    for (const Plan& plan : plans_)
        if (plan.serves(index, choice)) return &plan;
    return nullptr;
}

const Plan* Pack::find_any(const Arch& arch, Dtype dtype, Recipe recipe) const {
    const int index = int(&arch - archs_.begin());
    for (const Plan& plan : plans_)
        if (plan.arch == index && plan.dtype == dtype && plan.recipe == recipe) return &plan;
    return nullptr;
}

void Pack::list_capabilities(char* text, size_t bytes) const {
    size_t used = 0;
    text[0] = '\0';
    for (const Arch& arch : archs_) {
        const int wrote =
            snprintf(text + used, bytes - used, "%s%lld.%lld", used == 0 ? "" : ", ",
                     static_cast<long long>(arch.major), static_cast<long long>(arch.minor));
        if (wrote < 0 || size_t(wrote) >= bytes - used) return;
        used += size_t(wrote);
    }
}

bool Pack::read_image(const Kernel& kernel, Array<char>& image, Error& error) const {
    char path[sizeof folder_ + sizeof kernel.arch + sizeof kernel.symbol + 16];
    snprintf(path, sizeof path, "%s/%s/%s.cubin", folder_, kernel.arch, kernel.symbol);
    Error reason;
    if (!read_file(path, image, reason)) {
        // Said below.
    } else if (int64_t(image.size()) != kernel.image_bytes) {
        reason.set("%s has %zu bytes, not %lld", path, image.size(),
                   static_cast<long long>(kernel.image_bytes));
    } else {
        char digest[kDigestText + 1];
        sha256(image.data(), image.size(), digest);
        if (strcmp(digest, kernel.sha256) == 0) return true;
        reason.set("%s: its checksum differs", path);
    }
    return error.set(
        "the kernel pack %s: %s; build it again with `sagec kernels build --standalone`", folder_,
        reason.text);
}

}  // namespace sage_cuda
