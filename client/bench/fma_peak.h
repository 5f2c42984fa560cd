// Fused multiply-adds as fast as one core does them.
#pragma once

namespace clusterkv::client::bench {

// Runs for some tens of milliseconds; returns the multiplications and additions that it did.
double MultiplyAdds();

}  // namespace clusterkv::client::bench
