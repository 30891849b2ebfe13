/*
    This file is part of Quillon, a text editor.
    SPDX-License-Identifier: LGPL-2.1-or-later
*/

#include "undomanager.h"

#include "buffer.h"
#include "cursor.h"
#include "editorview.h"

#include <QLoggingCategory>
#include <QTimer>

#include <chrono>

Q_LOGGING_CATEGORY(lcUndo, "quillon.undo", QtWarningMsg)

namespace Quillon
{

namespace
{
constexpr std::chrono::milliseconds MergeWindow{1200};
}

/**
 * One primitive change. Lines are never mentioned by pointer: the buffer may
 * have been reloaded from disk in between.
 */
struct UndoItem {
    enum Type : quint8 { Insert, Remove, Wrap, Unwrap };

    Type type;
    int line;
    int column;
    QString text;

    bool continues(const UndoItem &next) const
    {
        if (type != next.type || line != next.line)
            return false;
        switch (type) {
        case Insert:
            return next.column == column + text.size();
        case Remove:
            // backspace moves leftwards, delete stays where it is
            return next.column + next.text.size() == column || next.column == column;
        default:
            return false;
        }
    }

    void absorb(const UndoItem &next)
    {
        if (type == Remove && next.column < column) {
            text.prepend(next.text);
            column = next.column;
        } else {
            text.append(next.text);
        }
    }
};

class UndoGroup
{
public:
    explicit UndoGroup(const Cursor &cursorBefore)
        : m_before(cursorBefore)
    {
    }

    bool isEmpty() const { return m_items.isEmpty(); }

    void add(UndoItem &&item)
    {
        if (!m_items.isEmpty() && m_items.last().continues(item))
            m_items.last().absorb(item);
        else
            m_items.append(std::move(item));
    }

    bool tryMerge(UndoGroup *other)
    {
        if (m_items.size() != 1 || other->m_items.size() != 1 || m_sealed)
            return false;
        if (!m_items.first().continues(other->m_items.first()))
            return false;
        m_items.first().absorb(other->m_items.first());
        m_after = other->m_after;
        return true;
    }

    void undo(Buffer *buffer) const
    {
        for (auto it = m_items.crbegin(); it != m_items.crend(); ++it)
            apply(buffer, *it, true);
    }

    void redo(Buffer *buffer) const
    {
        for (const UndoItem &item : m_items)
            apply(buffer, item, false);
    }

    void seal() { m_sealed = true; }

    Cursor m_before;
    Cursor m_after;

private:
    static void apply(Buffer *buffer, const UndoItem &item, bool backwards)
    {
        switch (item.type) {
        case UndoItem::Insert:
        case UndoItem::Remove:
            if ((item.type == UndoItem::Insert) != backwards)
                buffer->insertText(item.line, item.column, item.text);
            else
                buffer->removeText(item.line, item.column, item.text.size());
            break;
        case UndoItem::Wrap:
        case UndoItem::Unwrap:
            if ((item.type == UndoItem::Wrap) != backwards)
                buffer->wrapLine(item.line, item.column);
            else
                buffer->unwrapLine(item.line + 1);
            break;
        }
    }

    QVector<UndoItem> m_items;
    bool m_sealed = false;
};

UndoManager::UndoManager(Buffer *buffer)
    : QObject(buffer)
    , m_buffer(buffer)
    , m_mergeTimer(new QTimer(this))
{
    m_mergeTimer->setSingleShot(true);
    m_mergeTimer->setInterval(MergeWindow);
    connect(m_mergeTimer, &QTimer::timeout, this, &UndoManager::sealLastGroup);

    connect(buffer, &Buffer::textInserted, this, [this](int line, int column, const QString &text) {
        record({UndoItem::Insert, line, column, text});
    });
    connect(buffer, &Buffer::textRemoved, this, [this](int line, int column, const QString &text) {
        record({UndoItem::Remove, line, column, text});
    });
    connect(buffer, &Buffer::lineWrapped, this, [this](int line, int column) {
        record({UndoItem::Wrap, line, column, {}});
    });
    connect(buffer, &Buffer::lineUnwrapped, this, [this](int line, int column) {
        record({UndoItem::Unwrap, line, column, {}});
    });
    connect(buffer, &Buffer::saved, this, &UndoManager::markClean);
}

UndoManager::~UndoManager() = default;

void UndoManager::record(UndoItem &&item)
{
    if (m_replaying)
        return;
    if (!m_current) {
        qCWarning(lcUndo) << "change outside of a transaction, line" << item.line;
        return;
    }
    m_current->add(std::move(item));
    m_redo.clear();
}

void UndoManager::editStart(const Cursor &cursor)
{
    Q_ASSERT(!m_current);
    m_current = std::make_unique<UndoGroup>(cursor);
}

void UndoManager::editEnd(const Cursor &cursor)
{
    Q_ASSERT(m_current);
    std::unique_ptr<UndoGroup> group = std::move(m_current);
    if (group->isEmpty())
        return;

    group->m_after = cursor;
    if (m_undo.empty() || !m_undo.back()->tryMerge(group.get()))
        m_undo.push_back(std::move(group));
    m_mergeTimer->start();
    Q_EMIT undoAvailable(true);
    Q_EMIT redoAvailable(false);
}

void UndoManager::undo(EditorView *view)
{
    if (m_undo.empty())
        return;
    sealLastGroup();

    {
        const QScopedValueRollback<bool> guard(m_replaying, true);
        m_undo.back()->undo(m_buffer);
    }
    view->setCursor(m_undo.back()->m_before);
    m_redo.push_back(std::move(m_undo.back()));
    m_undo.pop_back();
    m_buffer->setModified(m_undo.size() != m_cleanDepth);

    Q_EMIT undoAvailable(!m_undo.empty());
    Q_EMIT redoAvailable(true);
}

void UndoManager::sealLastGroup()
{
    m_mergeTimer->stop();
    if (!m_undo.empty())
        m_undo.back()->seal();
}

} // namespace Quillon

#include "moc_undomanager.cpp"
