// What a user can mend: toprovar_run prints it as one line and exits with 2. A message says what failed, what was
// found, what is valid and what to do. Anything else that is thrown is a defect.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace toprovar::runtime {

class Error : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// All parts, written behind one another.
template <typename... Parts>
std::string text(Parts const&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

}  // namespace toprovar::runtime
