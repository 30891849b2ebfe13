#include "calc/formula_lexer.h"

#include <string>
#include <string_view>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace calc {
namespace {

using ::testing::ElementsAre;
using ::testing::Field;
using ::testing::IsEmpty;

constexpr Locale kEnglish{.decimal = '.', .separator = ','};
constexpr Locale kGerman{.decimal = ',', .separator = ';'};

std::vector<Token> LexAll(std::string_view text, const Locale& locale = kEnglish) {
  FormulaLexer lexer(text, locale);
  std::vector<Token> tokens;
  for (Token t = lexer.Next(); t.kind != Kind::kEnd; t = lexer.Next()) {
    tokens.push_back(t);
    if (t.kind == Kind::kError) break;
  }
  return tokens;
}

auto Is(Kind kind, std::string text) {
  return ::testing::AllOf(Field("kind", &Token::kind, kind), Field("text", &Token::text, text));
}

TEST(FormulaLexerTest, EmptyFormulaHasNoTokens) {
  EXPECT_THAT(LexAll(""), IsEmpty());
  EXPECT_THAT(LexAll(" \t\n"), IsEmpty());
}

TEST(FormulaLexerTest, TellsReferencesFromNames) {
  EXPECT_THAT(LexAll("A1"), ElementsAre(Is(Kind::kRef, "A1")));
  EXPECT_THAT(LexAll("$A$1"), ElementsAre(Is(Kind::kRef, "$A$1")));
  EXPECT_THAT(LexAll("tax2024"), ElementsAre(Is(Kind::kName, "tax2024")));
  // Beyond the last column, hence free to be a name.
  EXPECT_THAT(LexAll("XFE1"), ElementsAre(Is(Kind::kName, "XFE1")));
  EXPECT_THAT(LexAll("XFD1"), ElementsAre(Is(Kind::kRef, "XFD1")));
}

TEST(FormulaLexerTest, LOG10IsAFunctionWhenAParenthesisFollows) {
  EXPECT_THAT(LexAll("LOG10(2)"),
              ElementsAre(Is(Kind::kFunction, "LOG10"), Is(Kind::kOpen, "("),
                          Is(Kind::kNumber, "2"), Is(Kind::kClose, ")")));
  EXPECT_THAT(LexAll("LOG10+2"),
              ElementsAre(Is(Kind::kRef, "LOG10"), Is(Kind::kOperator, "+"),
                          Is(Kind::kNumber, "2")));
}

TEST(FormulaLexerTest, SheetNames) {
  EXPECT_THAT(LexAll("Stock!B2"), ElementsAre(Is(Kind::kSheet, "Stock"), Is(Kind::kRef, "B2")));
  EXPECT_THAT(LexAll("'Bob''s shed'!B2"),
              ElementsAre(Is(Kind::kSheet, "Bob's shed"), Is(Kind::kRef, "B2")));
}

TEST(FormulaLexerTest, UnterminatedSheetNameIsReportedAtItsQuote) {
  const auto tokens = LexAll("1+'Bob");
  ASSERT_EQ(tokens.size(), 3u);
  EXPECT_EQ(tokens[2].kind, Kind::kError);
  EXPECT_EQ(tokens[2].offset, 2u);
}

TEST(FormulaLexerTest, CommaDependsOnTheLocale) {
  EXPECT_THAT(LexAll("1,5", kEnglish),
              ElementsAre(Is(Kind::kNumber, "1"), Is(Kind::kSeparator, ","),
                          Is(Kind::kNumber, "5")));
  EXPECT_THAT(LexAll("1,5", kGerman), ElementsAre(Is(Kind::kNumber, "1.5")));
}

TEST(FormulaLexerTest, SpaceIsIntersectionOnlyBetweenReferences) {
  EXPECT_THAT(LexAll("B1:B9 A5:F5"),
              ElementsAre(Is(Kind::kRef, "B1"), Is(Kind::kOperator, ":"), Is(Kind::kRef, "B9"),
                          Is(Kind::kIntersect, " "), Is(Kind::kRef, "A5"),
                          Is(Kind::kOperator, ":"), Is(Kind::kRef, "F5")));
  EXPECT_THAT(LexAll("B1 + A5"), ElementsAre(Is(Kind::kRef, "B1"), Is(Kind::kOperator, "+"),
                                             Is(Kind::kRef, "A5")));
}

struct NumberCase {
  std::string_view input;
  double value;
};

class NumberTest : public ::testing::TestWithParam<NumberCase> {};

TEST_P(NumberTest, Value) {
  const auto tokens = LexAll(GetParam().input);
  ASSERT_EQ(tokens.size(), 1u);
  EXPECT_DOUBLE_EQ(tokens[0].number, GetParam().value);
}

INSTANTIATE_TEST_SUITE_P(Numbers, NumberTest,
                         ::testing::Values(NumberCase{"0", 0}, NumberCase{".5", 0.5},
                                           NumberCase{"5.", 5}, NumberCase{"1e3", 1000},
                                           NumberCase{"1E-2", 0.01},
                                           NumberCase{"007", 7}));

TEST(FormulaLexerTest, ExponentNeedsDigits) {
  // "2E" could be the start of "2E5" while the user is still typing.
  EXPECT_THAT(LexAll("2E"), ElementsAre(Is(Kind::kNumber, "2"), Is(Kind::kName, "E")));
}

TEST(FormulaLexerTest, ErrorLiterals) {
  EXPECT_THAT(LexAll("#N/A"), ElementsAre(Is(Kind::kErrorLiteral, "#N/A")));
  EXPECT_THAT(LexAll("#DIV/0!"), ElementsAre(Is(Kind::kErrorLiteral, "#DIV/0!")));
  EXPECT_EQ(LexAll("#OOPS")[0].kind, Kind::kError);
}

}  // namespace
}  // namespace calc
