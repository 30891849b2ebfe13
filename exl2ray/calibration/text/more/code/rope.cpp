// A rope for the editor's undo history: immutable, shared, balanced by weight.
//
// Every edit makes a new root and shares all untouched nodes with the previous one, so keeping ten
// thousand undo steps of a 40 MB file costs about as much as keeping the edits. Leaves hold up to
// kLeaf bytes; line breaks are counted per node so that "go to line 31 007" is a descent, not a scan.

#include <algorithm>
#include <cassert>
#include <cstddef>
#include <iostream>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

namespace text {

class Rope {
public:
    Rope() = default;
    explicit Rope(std::string_view s) : root_(build(s)) {}

    std::size_t size() const { return weight(root_); }
    std::size_t lines() const { return breaks(root_) + 1; }
    bool empty() const { return root_ == nullptr; }

    Rope insert(std::size_t at, std::string_view s) const
    {
        assert(at <= size());
        auto [left, right] = split(root_, at);
        return Rope(join(join(left, build(s)), right));
    }

    Rope erase(std::size_t at, std::size_t count) const
    {
        assert(at + count <= size());
        auto [left, rest] = split(root_, at);
        return Rope(join(left, split(rest, count).second));
    }

    char operator[](std::size_t i) const
    {
        const Node* n = root_.get();
        while (!n->leaf()) {
            const std::size_t w = weight(n->left);
            if (i < w) {
                n = n->left.get();
            } else {
                i -= w;
                n = n->right.get();
            }
        }
        return n->bytes[i];
    }

    /// Offset of the first byte of a line, counted from zero. Lines past the end give size().
    std::size_t line_start(std::size_t line) const
    {
        if (line == 0) return 0;
        if (line > breaks(root_)) return size();
        std::size_t offset = 0;
        const Node* n = root_.get();
        while (!n->leaf()) {
            const std::size_t b = breaks(n->left);
            if (line <= b) {
                n = n->left.get();
            } else {
                line -= b;
                offset += weight(n->left);
                n = n->right.get();
            }
        }
        std::size_t pos = 0;
        while (line-- > 0) pos = n->bytes.find('\n', pos) + 1;
        return offset + pos;
    }

    /// Calls f(std::string_view) for each leaf of [from, to), in order.
    template <class F>
    void visit(std::size_t from, std::size_t to, F&& f) const
    {
        if (root_ && from < to) visit(*root_, from, std::min(to, size()), f);
    }

    std::string str() const
    {
        std::string out;
        out.reserve(size());
        visit(0, size(), [&](std::string_view s) { out += s; });
        return out;
    }

private:
    struct Node;
    using Ptr = std::shared_ptr<const Node>;

    struct Node {
        Ptr left, right;        // both or neither
        std::string bytes;      // leaves only
        std::size_t size = 0;
        std::size_t breaks = 0;
        int height = 0;

        explicit Node(std::string_view s)
            : bytes(s), size(s.size()),
              breaks(static_cast<std::size_t>(std::count(s.begin(), s.end(), '\n'))) {}

        Node(Ptr l, Ptr r)
            : left(std::move(l)), right(std::move(r)),
              size(left->size + right->size), breaks(left->breaks + right->breaks),
              height(1 + std::max(left->height, right->height)) {}

        bool leaf() const { return left == nullptr; }
    };

    static constexpr std::size_t kLeaf = 512;

    explicit Rope(Ptr root) : root_(std::move(root)) {}

    static std::size_t weight(const Ptr& p) { return p ? p->size : 0; }
    static std::size_t breaks(const Ptr& p) { return p ? p->breaks : 0; }
    static Ptr node(Ptr l, Ptr r) { return std::make_shared<const Node>(std::move(l), std::move(r)); }
    static Ptr leaf(std::string_view s) { return std::make_shared<const Node>(s); }

    static Ptr build(std::string_view s)
    {
        if (s.empty()) return nullptr;
        if (s.size() <= kLeaf) return leaf(s);
        const std::size_t half = s.size() / 2;
        return node(build(s.substr(0, half)), build(s.substr(half)));
    }

    // AVL join: walk down the spine of the taller tree until the heights fit, then rotate back up.
    static Ptr join(const Ptr& l, const Ptr& r)
    {
        if (!l) return r;
        if (!r) return l;
        if (l->leaf() && r->leaf() && l->size + r->size <= kLeaf) return leaf(l->bytes + r->bytes);
        if (l->height > r->height + 1) return balance(l->left, join(l->right, r));
        if (r->height > l->height + 1) return balance(join(l, r->left), r->right);
        return node(l, r);
    }

    static Ptr balance(const Ptr& l, const Ptr& r)
    {
        if (l->height > r->height + 1) {
            if (l->left->height >= l->right->height) return node(l->left, node(l->right, r));
            return node(node(l->left, l->right->left), node(l->right->right, r));
        }
        if (r->height > l->height + 1) {
            if (r->right->height >= r->left->height) return node(node(l, r->left), r->right);
            return node(node(l, r->left->left), node(r->left->right, r->right));
        }
        return node(l, r);
    }

    static std::pair<Ptr, Ptr> split(const Ptr& n, std::size_t at)
    {
        if (at == 0) return {nullptr, n};
        if (at == weight(n)) return {n, nullptr};
        if (n->leaf()) {
            const std::string_view s = n->bytes;
            return {leaf(s.substr(0, at)), leaf(s.substr(at))};
        }
        const std::size_t w = weight(n->left);
        if (at <= w) {
            auto [a, b] = split(n->left, at);
            return {a, join(b, n->right)};
        }
        auto [a, b] = split(n->right, at - w);
        return {join(n->left, a), b};
    }

    template <class F>
    static void visit(const Node& n, std::size_t from, std::size_t to, F& f)
    {
        if (n.leaf()) {
            f(std::string_view(n.bytes).substr(from, to - from));
            return;
        }
        const std::size_t w = n.left->size;
        if (from < w) visit(*n.left, from, std::min(to, w), f);
        if (to > w) visit(*n.right, from > w ? from - w : 0, to - w, f);
    }

    Ptr root_;
};

}  // namespace text

int main()
{
    std::string model = "Low tide 04:12\nHigh tide 10:31\n";
    text::Rope rope{model};
    unsigned seed = 20011;
    for (int i = 0; i < 4000; ++i) {
        seed = seed * 1103515245u + 12345u;
        const std::size_t at = (seed >> 8) % (model.size() + 1);
        if (seed & 0x40000000u) {
            const std::size_t n = std::min<std::size_t>(seed % 9, model.size() - at);
            model.erase(at, n);
            rope = rope.erase(at, n);
        } else {
            const char* word = seed & 0x20000000u ? "slack\n" : "ebb and flow ";
            model.insert(at, word);
            rope = rope.insert(at, word);
        }
    }
    const bool ok = rope.str() == model
        && static_cast<long>(rope.lines()) == 1 + std::count(model.begin(), model.end(), '\n')
        && (rope.lines() < 2 || model[rope.line_start(1) - 1] == '\n');
    std::cout << (ok ? "ok, " : "MISMATCH, ") << rope.size() << " bytes, " << rope.lines() << " lines\n";
    return ok ? 0 : 1;
}
