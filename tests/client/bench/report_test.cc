#include "client/bench/report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace clusterkv::client::bench {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

Report MakeReport() {
  Report report;
  report.backend = "cuda";
  report.device = "a device";
  report.driver = "580.1";
  report.seed = 18446744073709551615u;
  report.repeats = 3;
  report.preset = "default";
  report.ceilings = {.device_copy = 2e12, .to_device = 50e9};
  report.rows.push_back(MakeRow("fetch", {{"context", 8192}, {"misses", 5}}, {40.0, 25.0, 30.0},
                                {.device_bytes = 2e6, .to_device_bytes = 1e6, .flops = 7.0},
                                report.ceilings));
  report.rows.back().extra = {{"gathered_bytes", 1000000}};
  report.notes.push_back("something was left out");
  return report;
}

TEST(BenchReport, HasTheContractsRows) {
  const auto json = nlohmann::ordered_json::parse(ReportJson(MakeReport()));
  ASSERT_EQ(json["rows"].size(), 1u);
  EXPECT_EQ(json["rows"][0].dump(),
            R"({"op":"fetch","shape":{"context":8192,"misses":5},"median_us":30.0,"p99_us":40.0,)"
            R"("bytes":1000000,"flops":7,"floor_us":20.0,"ceiling":"h2d",)"
            R"("ratio":0.6666666666666666,"device":"a device","driver":"580.1",)"
            R"("gathered_bytes":1000000})");
  EXPECT_EQ(json["seed"], 18446744073709551615u);
  EXPECT_EQ(json["ceilings"]["hbm-copy"], 2e12);
  EXPECT_EQ(json["notes"][0], "something was left out");
}

TEST(BenchReport, SaysNullWhereThereIsNoDriver) {
  Report report = MakeReport();
  report.driver.clear();
  const auto json = nlohmann::ordered_json::parse(ReportJson(report));
  EXPECT_TRUE(json["rows"][0]["driver"].is_null());
  EXPECT_TRUE(json["driver"].is_null());
}

TEST(BenchReport, IsATableForPeople) {
  EXPECT_THAT(ReportText(MakeReport()),
              AllOf(HasSubstr("driver 580.1"), HasSubstr("products not measured"),
                    HasSubstr("context 8192, misses 5; gathered_bytes 1000000"),
                    HasSubstr("0.667 h2d"), HasSubstr("note: something was left out")));
}

}  // namespace
}  // namespace clusterkv::client::bench
