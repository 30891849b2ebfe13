# frozen_string_literal: true

# Scales recipes and prints amounts the way a cook reads them: "1 1/2 tsp", never "1.4999 tsp".

require "minitest/autorun"

module Kitchen
  class ParseError < StandardError; end

  # An amount is a Rational so that a third of a cup, tripled, is one cup again.
  Ingredient = Struct.new(:amount, :unit, :name) do
    LINE = %r{
      \A (?: (?: (?<whole>\d+)\s+(?=\d) )?            # the 1 of "1 1/2", but not the 2 of "2 eggs"
             (?<num>\d+) (?: / (?<den>\d+) )? \s+
             (?: (?<unit>tbsp|tsp|cups?|g|ml)\s+ )?
         )?
         (?<name>.+) \z
    }x

    def self.parse(text)
      m = LINE.match(text.strip) or raise ParseError, "no ingredient in #{text.inspect}"
      return new(nil, nil, text.strip) if m[:num].nil?
      raise ParseError, "division by zero in #{text.inspect}" if m[:den]&.to_i&.zero?

      amount = Rational(m[:whole].to_i) + Rational(m[:num].to_i, (m[:den] || 1).to_i)
      new(amount, m[:unit]&.delete_suffix("s")&.to_sym, m[:name])
    end

    # "salt to taste" has no amount; four times as many guests still salt to taste.
    def *(other)
      amount ? self.class.new(amount * other, unit, name).tidy : self
    end

    # Moves to the unit a cook would reach for: 6 tsp are 2 tbsp, 1500 g stay grams.
    def tidy
      case unit
      when :tsp  then amount >= 3 ? convert(:tbsp, 3) : self
      when :tbsp then amount >= 8 ? convert(:cup, 16).tidy : self
      else self
      end
    end

    def to_s
      return name unless amount

      unit_text = unit == :cup && amount > 1 ? "cups" : unit
      [fraction, unit_text, name].compact.join(" ")
    end

    private

    def convert(new_unit, per)
      self.class.new(amount / per, new_unit, name)
    end

    def fraction
      # Scales measure metric amounts; spoons come in eighths at best.
      return amount.round.to_s if %i[g ml].include?(unit)

      nearest = [2, 3, 4, 8].map { |d| Rational((amount * d).round, d) }.min_by { |r| (r - amount).abs }
      whole, rest = nearest.divmod(1)
      parts = []
      parts << whole.to_s if whole.positive? || rest.zero?
      parts << "#{rest.numerator}/#{rest.denominator}" unless rest.zero?
      parts.join(" ")
    end
  end

  Recipe = Struct.new(:title, :servings, :ingredients, keyword_init: true) do
    def for(guests)
      factor = Rational(guests, servings)
      self.class.new(title:, servings: guests, ingredients: ingredients.map { |i| i * factor })
    end
  end
end

class RecipeTest < Minitest::Test
  def scaled(line, from:, to:)
    dough = Kitchen::Recipe.new(title: "dough", servings: from, ingredients: [Kitchen::Ingredient.parse(line)])
    dough.for(to).ingredients.first.to_s
  end

  def test_thirds_survive_a_round_trip
    assert_equal "1 cup milk", scaled("1/3 cup milk", from: 2, to: 6)
  end

  def test_spoons_become_bigger_spoons
    assert_equal "2 tbsp yeast", scaled("1 1/2 tsp yeast", from: 4, to: 16)
    assert_equal "1 1/2 cups oil", scaled("3 tbsp oil", from: 1, to: 8)
  end

  def test_grams_are_rounded
    assert_equal "167 g flour", scaled("500 g flour", from: 3, to: 1)
  end

  def test_things_without_unit_or_amount
    assert_equal "6 eggs", scaled("2 eggs", from: 4, to: 12)
    assert_equal "salt to taste", scaled("salt to taste", from: 4, to: 12)
  end

  def test_nonsense_is_named
    error = assert_raises(Kitchen::ParseError) { Kitchen::Ingredient.parse("1/0 cup sugar") }
    assert_match(/1\/0 cup/, error.message)
  end
end
