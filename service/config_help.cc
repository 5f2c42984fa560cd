#include "service/config_help.h"

#include <fmt/format.h>

#include <cctype>

#include "absl/strings/str_replace.h"
#include "service/config_keys.h"

namespace clusterkv::service {
namespace {

std::string Variable(const std::string& key) {
  std::string name = kEnvironmentPrefix;
  for (const char c : key) name += c == '-' ? '_' : static_cast<char>(std::toupper(c));
  return name;
}

// These depend on who runs the daemon, where a page must not.
std::string DefaultOnPage(const ConfigKey& key, const Config& defaults) {
  if (key.name == "allow-uids") return "the daemon's own uid";
  const std::string value = key.get(defaults);
  return value.empty() ? "" : fmt::format("`{}`", value);
}

// A bar would end the cell.
std::string Cell(const std::string& text) { return absl::StrReplaceAll(text, {{"|", "\\|"}}); }

}  // namespace

std::string HelpText(const Config& defaults) {
  std::string help =
      "clusterkvd: keeps the KV cache of LLM workers in pinned host memory, clustered.\n\n"
      "A flag goes before the environment (--host-memory is CLUSTERKV_HOST_MEMORY), that before\n"
      "the YAML file (host-memory:), that before the default.\n\n";
  for (const ConfigKey& key : ConfigKeys()) {
    const std::string value = key.get(defaults);
    help += fmt::format("  --{:<27} {}\n{:32}{}{}\n", key.name, key.type, "", key.help,
                        value.empty() ? "" : fmt::format(" [{}]", value));
  }
  help += fmt::format("  --{:<27} path\n{:32}YAML file with the same keys\n", "config", "");
  help +=
      "  --help, --help=markdown, --version\n\n"
      "Sizes: 4096, 64mb, 30gb (powers of 1024). Durations: 500ms, 10s.\n";
  return help;
}

std::string HelpMarkdown(const Config& defaults) {
  std::string page =
      "# Configuration of clusterkvd\n\n"
      "<!-- Written by `clusterkvd --help=markdown`; a test compares. -->\n\n"
      "Each key is a flag (`--host-memory 30gb`), an environment variable "
      "(`CLUSTERKV_HOST_MEMORY=30gb`)\n"
      "and a key of the YAML file (`host-memory: 30gb`) that `--config` or `CLUSTERKV_CONFIG` "
      "names. A flag\n"
      "goes before the environment, that before the file, that before the default. Unknown keys, "
      "bad values\n"
      "and combinations that cannot work end the daemon at start with exit code 2 and say what is "
      "allowed;\n"
      "the configuration in force is logged.\n\n"
      "Sizes: `4096`, `64mb`, `30gb` (powers of 1024). Durations: `500ms`, `10s`. Ids: "
      "`1000,1001`, "
      "or `any`.\n\n"
      "| key | variable | type | default | |\n|---|---|---|---|---|\n";
  for (const ConfigKey& key : ConfigKeys()) {
    page += fmt::format("| `{}` | `{}` | {} | {} | {} |\n", key.name, Variable(key.name),
                        Cell(key.type), Cell(DefaultOnPage(key, defaults)), Cell(key.help));
  }
  page +=
      "| | `CLUSTERKV_ADDRESS` | address | | read by clients (`clusterkvctl`, "
      "`clusterkv-replay`), not by the daemon |\n";
  return page;
}

}  // namespace clusterkv::service
