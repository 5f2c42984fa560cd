#include "client/replay/html_report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "client/replay/svg_chart.h"

namespace clusterkv::client::replay {
namespace {

using testing::HasSubstr;
using testing::Not;

size_t Count(const std::string& text, const std::string& part) {
  size_t count = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

ReportRow Row(const std::string& method, uint32_t budget, std::optional<uint32_t> layer,
              double recall, double error) {
  ReportRow row;
  row.method = method;
  row.budget = budget;
  row.layer = layer;
  row.recall = recall;
  row.output_error = error;
  row.mass = 0.75;
  if (method == "clusterkv") {
    row.hit_rate = layer == 3u ? 0.5 : 0.9;
    row.host_bytes_per_step = 2048;
  }
  return row;
}

Report TwoMethods() {
  Report report;
  report.trace = "some/trace.safetensors";
  report.model = "a model";
  report.preset = "default";
  report.quest_group = gpu::GroupRule::kMax;
  for (const char* method : {"clusterkv", "quest"}) {
    for (const uint32_t budget : {64u, 32u}) {
      const double error = method[0] == 'c' ? 0.125 : 0.25;
      report.rows.push_back(Row(method, budget, 3, 0.5, error));
      report.rows.push_back(Row(method, budget, 7, 0.5, error));
      report.rows.push_back(Row(method, budget, std::nullopt, 0.625, error));
    }
  }
  return report;
}

TEST(HtmlText, LeavesNoMarkup) {
  EXPECT_EQ(HtmlText("<b a=\"1\" c='2'>&"), "&lt;b a=&quot;1&quot; c=&#39;2&#39;&gt;&amp;");
  EXPECT_EQ(HtmlText("\xff\x01ok"), "\xef\xbf\xbd\xef\xbf\xbdok");
}

TEST(SvgChart, DrawsAPointForEachValueAndALineForEachSeries) {
  Chart chart{.title = "T & T", .x_label = "budget", .y_label = "recall", .series = {}};
  chart.percent = true;
  chart.series.push_back({.name = "one", .look = 0, .points = {{32, 0.5, {}}, {64, 0.75, {}}}});
  chart.series.push_back({.name = "two", .look = 1, .points = {{64, 1.0, {}}}});
  const std::string html = ChartHtml(chart);
  EXPECT_EQ(Count(html, "class=\"line\""), 2u);
  EXPECT_THAT(html, HasSubstr("<title>one, budget 32: 50.0 %</title>"));
  EXPECT_THAT(html, HasSubstr("<title>two, budget 64: 100.0 %</title>"));
  EXPECT_THAT(html, HasSubstr("T &amp; T"));
  EXPECT_THAT(html, HasSubstr(">100 %</text>"));
  EXPECT_THAT(html, Not(HasSubstr("nan")));
}

TEST(SvgChart, OfNothingOrOfOnePointIsNoNonsense) {
  Chart chart{.title = "T", .x_label = "x", .y_label = "y", .series = {}};
  EXPECT_THAT(ChartHtml(chart), HasSubstr("Nothing was measured"));
  chart.series.push_back({.name = "one", .look = 0, .points = {{5, 0.0, {}}}});
  EXPECT_THAT(ChartHtml(chart), Not(HasSubstr("nan")));
  EXPECT_THAT(ChartHtml(chart), Not(HasSubstr("inf")));
}

TEST(SvgChart, TheAxisOfErrorsBeginsAtZeroThatOfHitsWhereTheyAre) {
  Chart chart{.title = "T", .x_label = "x", .y_label = "y", .series = {}};
  chart.series.push_back({.name = "one", .look = 0, .points = {{1, 0.13, {}}, {2, 0.11, {}}}});
  EXPECT_THAT(ChartHtml(chart), testing::AllOf(HasSubstr(">0</text>"), HasSubstr(">0.2</text>")));
  chart.percent = true;
  chart.from_zero = false;
  chart.series[0].points = {{1, 0.93, {}}, {2, 0.97, {}}};
  EXPECT_THAT(ChartHtml(chart), HasSubstr(">90 %</text>"));
}

TEST(HtmlReport, IsCompleteInItself) {
  const std::string html = ReportHtml(TwoMethods());
  EXPECT_THAT(html, testing::StartsWith("<!doctype html>"));
  for (const char* part : {"http:", "https:", "//", "<script", "@import", "url(", "REPORT_"}) {
    EXPECT_THAT(html, Not(HasSubstr(part))) << part;
  }
  EXPECT_THAT(html, HasSubstr("default-src 'none'"));
}

TEST(HtmlReport, MarksTheLowestErrorOfABudget) {
  const std::string html = ReportHtml(TwoMethods());
  EXPECT_EQ(Count(html, "<td class=\"best\">0.1250</td>"), 2u);
  EXPECT_THAT(html, HasSubstr("<td class=\"text\">quest (max)</td><td>0.625</td><td>0.2500</td>"));
  EXPECT_THAT(html, HasSubstr("<td>90.0 %</td><td>2.0</td>"));
}

TEST(HtmlReport, HasATableOfLayersForEachBudget) {
  const std::string html = ReportHtml(TwoMethods());
  EXPECT_THAT(html, HasSubstr("Layers at budget 32"));
  EXPECT_THAT(html, HasSubstr("Layers at budget 64"));
  EXPECT_EQ(Count(html,
                  "<tr><td>3</td><td>0.500</td><td>0.500</td><td>0.1250</td><td>0.2500</td>"
                  "<td>50.0</td><td>2.0</td></tr>"),
            2u);
}

TEST(HtmlReport, HitRateIsOverTheCacheWhereSizesWereSwept) {
  Report report = TwoMethods();
  EXPECT_THAT(ReportHtml(report), HasSubstr("worst layer, budget 32: 50.0 %"));
  EXPECT_THAT(ReportHtml(report), HasSubstr("--cache-tokens 4096"));
  report.cache_rows = {{.cache_tokens = 128, .budget = 32, .layer = 3, .hit_rate = 0.1},
                       {.cache_tokens = 128, .budget = 32, .layer = {}, .hit_rate = 0.6},
                       {.cache_tokens = 256, .budget = 32, .layer = {}, .hit_rate = 0.8}};
  const std::string html = ReportHtml(report);
  EXPECT_THAT(html, HasSubstr("<title>budget 32, 128 tokens, 4.0 budgets: 60.0 %</title>"));
  EXPECT_THAT(html, HasSubstr("<title>budget 32, 256 tokens, 8.0 budgets: 80.0 %</title>"));
  EXPECT_THAT(html, Not(HasSubstr("worst layer, budget")));
}

TEST(HtmlReport, BaselinesAloneHaveNoHits) {
  Report report = TwoMethods();
  std::erase_if(report.rows, [](const ReportRow& row) { return row.method == "clusterkv"; });
  const std::string html = ReportHtml(report);
  EXPECT_THAT(html, Not(HasSubstr("--cache-tokens")));
  EXPECT_THAT(html, HasSubstr("Layers at budget 32"));
}

TEST(HtmlReport, NamesAreText) {
  Report report = TwoMethods();
  report.trace = "<img src=x onerror=alert(1)>REPORT_BODY\xff";
  report.model = "</pre><script>alert(1)</script>";
  const std::string html = ReportHtml(report);
  EXPECT_THAT(html, Not(HasSubstr("<img")));
  EXPECT_THAT(html, Not(HasSubstr("<script")));
  EXPECT_THAT(html, HasSubstr("&lt;img src=x onerror=alert(1)&gt;REPORT_BODY\xef\xbf\xbd"));
}

}  // namespace
}  // namespace clusterkv::client::replay
