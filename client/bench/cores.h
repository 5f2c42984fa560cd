// How many cores this process may use.
#pragma once

namespace clusterkv::client::bench {

int UsableCores();  // at least 1

}  // namespace clusterkv::client::bench
