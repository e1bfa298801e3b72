// The result of something that can fail, without exceptions and without allocation: safe in enqueue.
#pragma once

#include <cstdarg>
#include <cstdio>

namespace toprovar {

class [[nodiscard]] Status {
public:
    Status() noexcept : failed_(false) { text_[0] = '\0'; }

    // A message says what failed, what was found, what is valid and what to do. It is cut at the buffer's end.
    __attribute__((format(printf, 1, 2))) static Status error(char const* format, ...) noexcept {
        Status status;
        status.failed_ = true;
        va_list arguments;
        va_start(arguments, format);
        std::vsnprintf(status.text_, sizeof(status.text_), format, arguments);
        va_end(arguments);
        return status;
    }

    bool ok() const noexcept { return !failed_; }
    char const* message() const noexcept { return text_; }

private:
    bool failed_;
    char text_[480];
};

}  // namespace toprovar
