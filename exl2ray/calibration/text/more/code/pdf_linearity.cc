// Decides in which order objects are written, so that a viewer on a slow line
// can show page one before the rest has arrived.

#include <algorithm>
#include <deque>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "press/Document.hh"
#include "press/LayoutPlan.hh"
#include "press/Object.hh"

namespace
{
    // Keys that lead out of a page to the rest of the document. Following
    // them would make every object "needed by page one".
    std::set<std::string> const barriers = {"/Parent", "/Dest", "/P", "/StructParent", "/B"};

    struct Users
    {
        std::set<int> pages;
        bool outlines = false;
        bool catalogue = false;
        bool thumbnail = false;
    };

    class Walker
    {
      public:
        Walker(std::map<ObjId, Users>& users, std::set<ObjId> const& page_ids)
            : users(users), page_ids(page_ids)
        {
        }

        // Visits all that can be reached from an object, calling mark on the
        // users record of each indirect object exactly once.
        template <typename Mark>
        void
        walk(Object const& start, Mark mark)
        {
            std::set<ObjId> seen;
            std::deque<std::pair<Object, bool>> queue{{start, true}};
            while (!queue.empty()) {
                auto [obj, top] = queue.front();
                queue.pop_front();
                if (obj.isIndirect()) {
                    ObjId id = obj.id();
                    if (!top && page_ids.count(id)) {
                        continue;
                    }
                    if (!seen.insert(id).second) {
                        continue;
                    }
                    mark(users[id]);
                }
                if (obj.isArray()) {
                    for (auto const& item: obj.items()) {
                        queue.emplace_back(item, false);
                    }
                } else if (obj.isDictionary() || obj.isStream()) {
                    for (auto const& [key, value]: obj.dict()) {
                        if (!barriers.count(key)) {
                            queue.emplace_back(value, false);
                        }
                    }
                }
            }
        }

      private:
        std::map<ObjId, Users>& users;
        std::set<ObjId> const& page_ids;
    };
} // namespace

LayoutPlan
LayoutPlan::make(Document& doc)
{
    auto const pages = doc.pages();
    if (pages.empty()) {
        throw std::logic_error("a document without pages cannot be linearised");
    }

    std::set<ObjId> page_ids;
    for (auto const& page: pages) {
        // The same page object used twice in the tree: every page needs its
        // own hint, hence its own object.
        if (!page_ids.insert(page.id()).second) {
            throw std::logic_error("page " + page.id().str() + " occurs twice; copy it first");
        }
    }

    std::map<ObjId, Users> users;
    Walker walker(users, page_ids);

    for (size_t n = 0; n < pages.size(); ++n) {
        walker.walk(pages[n], [n](Users& u) { u.pages.insert(static_cast<int>(n)); });
        if (Object thumb = pages[n].key("/Thumb"); thumb.isStream()) {
            walker.walk(thumb, [](Users& u) { u.thumbnail = true; });
        }
    }
    for (auto const& [key, value]: doc.root().dict()) {
        if (key == "/Outlines") {
            walker.walk(value, [](Users& u) { u.outlines = true; });
        } else if (key != "/Pages") {
            walker.walk(value, [](Users& u) { u.catalogue = true; });
        }
    }

    bool const show_outlines = doc.root().key("/PageMode").isName("/UseOutlines");

    LayoutPlan plan;
    plan.private_objects.resize(pages.size());

    for (auto const& [id, u]: users) {
        bool const first = u.pages.count(0) || (u.outlines && show_outlines);
        if (first) {
            plan.first_page.push_back(id);
        } else if (u.thumbnail) {
            plan.rest.push_back(id);
        } else if (u.pages.size() == 1 && !u.outlines && !u.catalogue) {
            plan.private_objects[static_cast<size_t>(*u.pages.begin())].push_back(id);
        } else if (u.pages.size() > 1) {
            plan.shared.push_back(id);
        } else {
            plan.rest.push_back(id);
        }
    }

    // Within each part the page dictionary goes first, as a viewer can do
    // nothing before it has that.
    auto lead = [](std::vector<ObjId>& part, ObjId head) {
        auto it = std::find(part.begin(), part.end(), head);
        if (it != part.end()) {
            std::rotate(part.begin(), it, it + 1);
        }
    };
    lead(plan.first_page, pages[0].id());
    for (size_t n = 1; n < pages.size(); ++n) {
        lead(plan.private_objects[n], pages[n].id());
        for (auto const& id: plan.shared) {
            if (users[id].pages.count(static_cast<int>(n))) {
                plan.hints[n].push_back(id);
            }
        }
    }
    return plan;
}
