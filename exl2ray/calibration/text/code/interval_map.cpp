// interval_map.cpp - maps every key of an ordered type to a value, storing only the changes.
//
// Typical use: which tariff applies at which minute of the week, or which page protection holds at
// which address. The map starts out constant and is edited by assigning half-open ranges:
//
//     interval_map<int, char> m{'A'};
//     m.assign(8, 12, 'B');      // ... A | 8: B | 12: A ...
//
// Invariant ("canonical form"): two neighbouring entries never carry the same value, and the first
// entry differs from the initial value. Equality of maps is then equality of their entries.

#include <cassert>
#include <concepts>
#include <iostream>
#include <iterator>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

template <typename K>
concept OrderedKey = std::copyable<K> && requires(const K& a, const K& b) {
    { a < b } -> std::convertible_to<bool>;
};

// Only operator< is asked of keys and only operator== of values. A key type need not be countable:
// strings and doubles work, which rules out any "key - 1" arithmetic below.
template <OrderedKey K, std::equality_comparable V>
    requires std::copyable<V>
class interval_map {
public:
    explicit interval_map(V initial) : initial_(std::move(initial)) {}

    const V& operator[](const K& key) const {
        auto it = changes_.upper_bound(key);
        return it == changes_.begin() ? initial_ : std::prev(it)->second;
    }

    // Gives [begin, end) the value v. An empty or reversed range changes nothing.
    void assign(const K& begin, const K& end, const V& v) {
        if (!(begin < end)) return;

        // Look up both neighbours before touching anything: v may refer into our own storage,
        // and what stands at `end` has to be known before the entries in between are erased.
        V value = v;
        V after = (*this)[end];
        auto first = changes_.lower_bound(begin);
        const V& before = first == changes_.begin() ? initial_ : std::prev(first)->second;
        const bool starts_change = !(before == value);
        auto last = changes_.upper_bound(end);

        auto hint = changes_.erase(first, last);
        if (!(after == value)) hint = changes_.emplace_hint(hint, end, std::move(after));
        if (starts_change) changes_.emplace_hint(hint, begin, std::move(value));
    }

    // Calls f(begin, end, value) for each maximal constant stretch between lo and hi.
    template <std::invocable<const K&, const K&, const V&> F>
    void for_each(const K& lo, const K& hi, F&& f) const {
        K from = lo;
        auto it = changes_.upper_bound(lo);
        while (from < hi) {
            const K to = it != changes_.end() && it->first < hi ? it->first : hi;
            f(from, to, (*this)[from]);
            from = to;
            if (it != changes_.end()) ++it;
        }
    }

    std::size_t changes() const noexcept { return changes_.size(); }

    bool is_canonical() const {
        const V* previous = &initial_;
        for (const auto& [key, value] : changes_) {
            if (*previous == value) return false;
            previous = &value;
        }
        return true;
    }

    friend bool operator==(const interval_map&, const interval_map&) = default;

private:
    V initial_;
    std::map<K, V> changes_;
};

namespace {

// Compares against the obvious implementation: one array cell per key.
void agrees_with_an_array(unsigned seed) {
    constexpr int size = 40;
    std::mt19937 rng(seed);
    std::uniform_int_distribution<int> key(0, size - 1);
    std::uniform_int_distribution<int> letter('a', 'd');  // few letters, so that merges happen

    std::vector<char> plain(size, 'a');
    interval_map<int, char> map{'a'};
    for (int round = 0; round < 400; ++round) {
        const int b = key(rng), e = key(rng);
        const char v = static_cast<char>(letter(rng));
        map.assign(b, e, v);
        for (int k = b; k < e; ++k) plain[static_cast<std::size_t>(k)] = v;

        assert(map.is_canonical());
        for (int k = 0; k < size; ++k) assert(map[k] == plain[static_cast<std::size_t>(k)]);
    }
}

void value_may_alias_the_map() {
    interval_map<int, std::string> m{"night"};
    m.assign(6, 22, "day");
    m.assign(0, 10, m[12]);  // the reference points at an entry that assign() erases
    assert(m[3] == "day" && m[21] == "day" && m[22] == "night");
    assert(m.changes() == 2);
}

}  // namespace

int main() {
    for (unsigned seed = 1; seed <= 50; ++seed) agrees_with_an_array(seed);
    value_may_alias_the_map();

    interval_map<double, std::string> tariff{"low"};
    tariff.assign(7.0, 21.0, "high");
    tariff.assign(12.5, 14.0, "solar");
    tariff.for_each(0.0, 24.0, [](double from, double to, const std::string& name) {
        std::cout << from << " - " << to << "  " << name << '\n';
    });
}
