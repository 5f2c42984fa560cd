// Our parameters as messages.
#pragma once

#include "client/client.h"
#include "clusterkv/v1/sequence.pb.h"

namespace clusterkv::client {

v1::Shape ToWire(const gpu::Shape& shape);
v1::Method ToWire(const gpu::MethodOptions& method);
v1::FetchMode ToWire(FetchMode mode);

}  // namespace clusterkv::client
