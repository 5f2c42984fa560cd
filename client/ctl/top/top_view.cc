#include "client/ctl/top/top_view.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>
#include <utility>

#include "client/ctl/status_json.h"
#include "client/ctl/terminal_text.h"

namespace clusterkv::client::ctl {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kBarColumns = 40;
constexpr size_t kShownErrors = 3;
constexpr double kOldAnswerSeconds = 10;  // the daemon is not ready from here on

std::string Bytes(uint64_t bytes) { return BytesText(static_cast<double>(bytes)); }

std::string Percent(const std::optional<double>& part) {
  return part ? fmt::format("{:.1f} %", 100 * *part) : std::string("-");
}

std::string Span(double seconds) {
  if (seconds < 120) return fmt::format("{:.0f} s", seconds);
  if (seconds < 7200) return fmt::format("{:.0f} min", std::floor(seconds / 60));
  if (seconds < 48 * 3600) return fmt::format("{:.0f} h", std::floor(seconds / 3600));
  return fmt::format("{:.0f} d", std::floor(seconds / 86400));
}

std::vector<const v1::SessionInfo*> BySize(const v1::GetStatusReply& status) {
  std::vector<const v1::SessionInfo*> sessions;
  for (const v1::SessionInfo& session : status.session_list()) sessions.push_back(&session);
  std::ranges::stable_sort(sessions, std::greater<>(), [](const v1::SessionInfo* session) {
    return session->host_bytes() + session->gpu_bytes();
  });
  return sessions;
}

StyledLine Heading(const TopTick& tick) {
  const v1::GetStatusReply& status = tick.status;
  StyledLine line("clusterkvd " + Printable(status.version()), Style::kBold);
  line.Add("  ");
  if (!tick.error.empty()) {
    line.Add("no answer", Style::kBad);
  } else if (status.ready()) {
    line.Add("ready", Style::kGood);
  } else {
    line.Add("not ready: " + Printable(status.not_ready_reason()), Style::kBad);
  }
  line.Add(fmt::format("  up {}  {}", Span(status.uptime_seconds()), Printable(tick.address)));
  return line.Add("  ").Add(tick.time, Style::kQuiet);
}

StyledLine Device(const v1::GetStatusReply& status) {
  StyledLine line(fmt::format("device    {}, {} used, ", Printable(status.device()),
                              Bytes(status.gpu_bytes_used())));
  const double age = status.device_age_seconds();
  return line.Add(fmt::format("answered {:.1f} s ago", age),
                  age < kOldAnswerSeconds ? Style::kPlain : Style::kBad);
}

// The pool's states side by side; the rest is free.
StyledLine Pool(const v1::HostBytes& host) {
  struct State {
    const char* name;
    uint64_t bytes;
    char sign;
    Style style;
  };
  const State states[] = {{"used", host.used(), '#', Style::kGood},
                          {"reserved", host.reserved(), '=', Style::kPlain},
                          {"quarantined", host.quarantined(), '~', Style::kWarning}};
  StyledLine line("host      [");
  uint64_t before = 0;
  size_t drawn = 0;
  const double total = std::max(1.0, static_cast<double>(host.total()));
  for (const State& state : states) {
    before += state.bytes;
    const auto end = static_cast<size_t>(
        std::lround(kBarColumns * std::min(1.0, static_cast<double>(before) / total)));
    line.Add(std::string(end - drawn, state.sign), state.style);
    drawn = end;
  }
  line.Add(std::string(kBarColumns - drawn, '.'), Style::kQuiet).Add("]");
  for (const State& state : states) {
    line.Add(fmt::format("  {} {} {}", state.sign, state.name, Bytes(state.bytes)));
  }
  return line.Add(fmt::format("  of {}", Bytes(host.total())));
}

StyledLine Cache(const char* name, const std::optional<CacheRates>& now, const CacheRates& all) {
  const std::string rate =
      now ? fmt::format("{:>8} hit of {:>8} clusters/s", Percent(now->hit_rate),
                        CountText(now->clusters_per_second))
          : fmt::format("{:>8}", "-");
  StyledLine line(fmt::format("{:<9} {}", name, rate));
  return line.Add(fmt::format("   since the start {}", Percent(all.hit_rate)), Style::kQuiet);
}

std::vector<StyledLine> Work(const TopTick& tick) {
  const v1::Counters& counters = tick.status.counters();
  std::vector<StyledLine> lines;
  const v1::CacheCounters none;
  const auto& rates = tick.rates;
  lines.push_back(Cache("direct", rates ? std::optional(rates->direct) : std::nullopt,
                        CacheRatesOf(none, counters.direct(), 1)));
  lines.push_back(Cache("served", rates ? std::optional(rates->served) : std::nullopt,
                        CacheRatesOf(none, counters.served(), 1)));
  lines.emplace_back(
      rates ? fmt::format("work      {} tokens/s ingested, {} tokens/s clustered ({:.1f} % of the "
                          "time), {}/s read from host",
                          CountText(rates->ingested_tokens_per_second),
                          CountText(rates->clustered_tokens_per_second), 100 * rates->cluster_share,
                          BytesText(rates->gathered_bytes_per_second))
            : fmt::format("work      {} tokens ingested, {} clustered since the start",
                          CountText(static_cast<double>(counters.ingested_tokens())),
                          CountText(static_cast<double>(counters.clustered_tokens()))));
  lines.emplace_back(fmt::format(
      "workers   {} sessions, {} sequences; {} sessions started, {} lost, {} attaches refused",
      tick.status.sessions(), tick.status.sequences(), counters.sessions_started(),
      counters.sessions_lost(), counters.rejected_attaches()));
  return lines;
}

void AddErrors(const v1::GetStatusReply& status, std::vector<StyledLine>& lines) {
  const int count = status.recent_errors_size();
  for (int i = std::max(0, count - static_cast<int>(kShownErrors)); i < count; ++i) {
    const v1::RecentError& error = status.recent_errors(i);
    const Style style = error.level() == "error" ? Style::kBad : Style::kWarning;
    StyledLine line(Printable(error.time()) + " ", Style::kQuiet);
    line.Add(Printable(error.level()), style);
    lines.push_back(line.Add(" ").Add(Printable(error.text())));
  }
}

using Rows = std::vector<std::vector<std::string>>;

// The first row is the heading.
void AddTable(const Rows& rows, std::vector<StyledLine>& lines) {
  std::istringstream table(Table(rows));
  Style style = Style::kBold;
  for (std::string text; std::getline(table, text); style = Style::kPlain) {
    lines.emplace_back(text, style);
  }
}

void AddGrants(const v1::GetStatusReply& status, std::vector<StyledLine>& lines) {
  std::map<std::string, size_t> sessions;
  for (const v1::SessionInfo& session : status.session_list()) ++sessions[session.grant()];
  Rows rows = {{"GRANT", "LIMIT", "USED", "RESERVED", "QUARANTINED", "SESSIONS"}};
  for (const v1::GrantInfo& grant : status.grant_list()) {
    const v1::HostBytes& host = grant.host_bytes();
    rows.push_back({grant.grant(), Bytes(host.total()), Bytes(host.used()), Bytes(host.reserved()),
                    Bytes(host.quarantined()), std::to_string(sessions[grant.grant()])});
  }
  AddTable(rows, lines);
}

void AddSessions(const v1::GetStatusReply& status, std::vector<StyledLine>& lines) {
  Rows rows = {{"SESSION", "HOST", "DEVICE", "SEQUENCES", "AGE", "PID", "UID", "NAME"}};
  for (const v1::SessionInfo* session : BySize(status)) {
    rows.push_back({std::to_string(session->session_id()), Bytes(session->host_bytes()),
                    Bytes(session->gpu_bytes()), std::to_string(session->sequences()),
                    Span(session->age_seconds()),
                    session->pid() == 0 ? "-" : std::to_string(session->pid()),
                    std::to_string(session->uid()),
                    session->client_name() + (session->attached() ? "" : " (not attached)")});
  }
  AddTable(rows, lines);
}

Json CacheJson(const CacheRates& rates) {
  Json json{{"clusters_per_second", rates.clusters_per_second}, {"hit_rate", nullptr}};
  if (rates.hit_rate) json["hit_rate"] = *rates.hit_rate;
  return json;
}

Json RatesJson(const std::optional<Rates>& rates) {
  if (!rates) return nullptr;
  return {{"seconds", rates->seconds},
          {"direct", CacheJson(rates->direct)},
          {"served", CacheJson(rates->served)},
          {"gathered_bytes_per_second", rates->gathered_bytes_per_second},
          {"ingested_tokens_per_second", rates->ingested_tokens_per_second},
          {"clustered_tokens_per_second", rates->clustered_tokens_per_second},
          {"cluster_problems_per_second", rates->cluster_problems_per_second},
          {"cluster_share", rates->cluster_share}};
}

}  // namespace

std::vector<StyledLine> TopLines(const TopTick& tick) {
  std::vector<StyledLine> lines{Heading(tick)};
  if (!tick.error.empty()) lines.emplace_back(Printable(tick.error), Style::kBad);
  lines.push_back(Device(tick.status));
  lines.push_back(Pool(tick.status.host_bytes()));
  for (StyledLine& line : Work(tick)) lines.push_back(std::move(line));
  lines.emplace_back();
  if (tick.status.recent_errors_size() > 0) {
    AddErrors(tick.status, lines);
    lines.emplace_back();
  }
  if (tick.status.grant_list_size() > 0) {
    AddGrants(tick.status, lines);
    lines.emplace_back();
  }
  AddSessions(tick.status, lines);
  return lines;
}

std::string TopJson(const TopTick& tick) {
  const v1::GetStatusReply& status = tick.status;
  Json json{{"time", tick.time}, {"address", tick.address}};
  if (!tick.error.empty()) {
    json["error"] = tick.error;
  } else {
    Json sessions = Json::array();
    for (const v1::SessionInfo* session : BySize(status)) {
      sessions.push_back(SessionInfoJson(*session));
    }
    json.update({{"boot_epoch", status.boot_epoch()},
                 {"ready", status.ready()},
                 {"not_ready_reason", status.not_ready_reason()},
                 {"uptime_seconds", status.uptime_seconds()},
                 {"device_age_seconds", status.device_age_seconds()},
                 {"rates", RatesJson(tick.rates)},
                 {"counters", CountersJson(status)},
                 {"host_bytes", HostBytesJson(status.host_bytes())},
                 {"gpu_bytes", {{"used", status.gpu_bytes_used()}}},
                 {"sessions", status.sessions()},
                 {"sequences", status.sequences()},
                 {"session_list", std::move(sessions)},
                 {"grant_list", GrantListJson(status)},
                 {"recent_errors", RecentErrorsJson(status)}});
  }
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace clusterkv::client::ctl
