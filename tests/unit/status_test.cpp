// SPDX-License-Identifier: Apache-2.0
#include "kvsparse/core/status.hpp"

#include <gtest/gtest.h>

#include <vector>

#include "kvsparse/core/shape_check.hpp"

namespace kvsparse {
namespace {

using Code = Status::Code;

TEST(Status, TheDefaultIsSuccess) {
  const Status status;
  EXPECT_TRUE(status.ok());
  EXPECT_TRUE(static_cast<bool>(status));
  EXPECT_EQ(status.message(), "ok");
  EXPECT_EQ(status.value(), 0U);
  EXPECT_EQ(status.limit(), 0U);
}

TEST(Status, EverySentenceNamesTheValueAndTheLimit) {
  for (const Code code :
       {Code::wrong_heads, Code::wrong_head_dim, Code::wrong_tokens, Code::wrong_size, Code::prompt_ended,
        Code::prompt_exceeds_budget, Code::max_tokens_reached, Code::nothing_to_attend, Code::layer_out_of_turn,
        Code::layer_drifted, Code::step_differs, Code::lists_too_small, Code::page_read_in_part, Code::page_weighted,
        Code::query_rotated, Code::list_has_gap, Code::no_such_block, Code::heads_differ, Code::query_is_over}) {
    const Status status(code, 1234, 5678);
    EXPECT_FALSE(status.ok());
    EXPECT_EQ(status.code(), code);
    EXPECT_NE(status.message().find("1234"), std::string::npos) << status.message();
    EXPECT_NE(status.message().find("5678"), std::string::npos) << status.message();
  }
}

TEST(Status, SentencesReadWell) {
  EXPECT_EQ(Status(Code::wrong_heads, 3, 2).message(), "a row view has 3 heads; this cache needs 2");
  EXPECT_EQ(Status(Code::max_tokens_reached, 9, 8).message(), "token 9 would exceed max_tokens = 8");
  EXPECT_EQ(Status(Code::prompt_ended, 9, 8).message(), "the prompt ended at position 8; append_prompt came at 9");
}

TEST(ShapeCheck, FlatSpansMustHoldExactlyTheRows) {
  constexpr std::size_t head_dim = 8;
  EXPECT_TRUE(check_size(16, 2, head_dim).ok());
  const Status status = check_size(17, 2, head_dim);
  EXPECT_EQ(status.code(), Code::wrong_size);
  EXPECT_EQ(status.value(), 17U);
  EXPECT_EQ(status.limit(), 16U);
}

TEST(ShapeCheck, RowViewsMustHaveTheHeadsAndTheirDimension) {
  constexpr std::size_t head_dim = 8;
  const std::vector<float> data(64);
  EXPECT_TRUE(check_rows(HeadRows<const float>(data.data(), 2, 8), 2, head_dim).ok());
  EXPECT_EQ(check_rows(HeadRows<const float>(data.data(), 3, 8), 2, head_dim).code(), Code::wrong_heads);
  EXPECT_EQ(check_rows(HeadRows<const float>(data.data(), 2, 7), 2, head_dim).code(), Code::wrong_head_dim);
  EXPECT_TRUE(check_rows(TokenRows<const float>(data.data(), 3, 2, 8), 2, head_dim).ok());
  EXPECT_EQ(check_rows(TokenRows<const float>(data.data(), 3, 1, 8), 2, head_dim).code(), Code::wrong_heads);
}

TEST(Views, RowsFollowTheirStrides) {
  std::vector<float> data(200);
  const HeadRows<float> dense(data.data(), 3, 8);
  EXPECT_EQ(dense.row(2), data.data() + 16);
  const TokenRows<float> strided(data.data(), 4, 2, 8, 40, 12);
  EXPECT_EQ(strided.token(3).row(1), data.data() + 132);
  EXPECT_EQ(strided.token(3).head_dim, 8U);
  const TokenRows<const float> read_only = strided;
  EXPECT_EQ(read_only.token(1).row(0), data.data() + 40);
  const QueryGroup group{data.data(), 3, 8, 10, 0.5F};
  EXPECT_EQ(group[2].data(), data.data() + 20);
  EXPECT_EQ(group.only(1)[0].data(), data.data() + 10);
  EXPECT_EQ(group.only(1).size, 1U);
}

}  // namespace
}  // namespace kvsparse
