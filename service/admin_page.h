// The admin port's page, as admin_page.html has it. PAGE_NONCE stands where the nonce of the
// response's Content-Security-Policy goes.
#pragma once

#include <string_view>

namespace clusterkv::service {

extern const std::string_view kAdminPage;

}  // namespace clusterkv::service
