#ifndef INTRUSIVE_LIST_H
#define INTRUSIVE_LIST_H
/*
 * Doubly linked lists whose links live inside the listed objects.
 *
 *	struct train {
 *		int         number;
 *		struct link on_platform;	// member of platform.trains
 *		struct link by_delay;		// member of board.late, perhaps of nothing
 *	};
 *
 * One object can sit in as many lists as it has links, joining and leaving allocates nothing, and
 * an object can leave without knowing which list it is in. The price: the list does not own its
 * members. Whoever frees a struct train takes it off both lists first; with IL_PARANOID defined
 * a link that was freed while linked is found at the next operation on one of its neighbours.
 *
 * A list head is a link too. The ring always contains at least the head, so there is no NULL
 * anywhere and neither insertion nor removal contains a branch.
 */
#include <assert.h>
#include <stdbool.h>
#include <stddef.h>

struct link {
	struct link *next, *prev;
};

#define LIST_INIT(name)		{ &(name), &(name) }
#define LIST(name)		struct link name = LIST_INIT(name)

/* From the address of a member to the address of the object around it. The comparison in the
   unevaluated sizeof makes the compiler complain when ptr does not point to such a member. */
#define owner_of(ptr, type, member)						\
	((type *)((char *)(ptr) - offsetof(type, member)			\
		  + 0 * sizeof((ptr) == &((type *)0)->member)))

#ifdef IL_PARANOID
#define IL_CHECK(l)	assert((l)->next->prev == (l) && (l)->prev->next == (l))
#define IL_POISON	((struct link *)(size_t)0xdead10cc)
#else
#define IL_CHECK(l)	((void)0)
#endif

static inline void link_init(struct link *l)
{
	l->next = l->prev = l;
}

static inline bool list_empty(const struct link *head)
{
	return head->next == head;
}

/* Is this object in some list? Only meaningful if it was initialised or removed with list_take(). */
static inline bool link_used(const struct link *l)
{
	return l->next != l;
}

static inline void list_insert_between(struct link *l, struct link *before, struct link *after)
{
	IL_CHECK(before);
	IL_CHECK(after);
	l->prev = before;
	l->next = after;
	before->next = l;
	after->prev = l;
}

static inline void list_push_front(struct link *head, struct link *l)
{
	list_insert_between(l, head, head->next);
}

static inline void list_push_back(struct link *head, struct link *l)
{
	list_insert_between(l, head->prev, head);
}

/* Off the list for good: the object is about to be freed. */
static inline void list_drop(struct link *l)
{
	IL_CHECK(l);
	l->prev->next = l->next;
	l->next->prev = l->prev;
#ifdef IL_PARANOID
	l->next = l->prev = IL_POISON;
#endif
}

/* Off the list, but ready to join another. Harmless on a link that is in no list. */
static inline void list_take(struct link *l)
{
	IL_CHECK(l);
	l->prev->next = l->next;
	l->next->prev = l->prev;
	link_init(l);
}

/* Move everything in src to the end of dst; src is empty afterwards. Constant time. */
static inline void list_splice_back(struct link *dst, struct link *src)
{
	struct link *first = src->next, *last = src->prev;

	if (list_empty(src))
		return;
	first->prev = dst->prev;
	dst->prev->next = first;
	last->next = dst;
	dst->prev = last;
	link_init(src);
}

/* The usual walk. The body may change the current object but must not take it off the list. */
#define list_each(var, head, type, member)					\
	for (type *var = owner_of((head)->next, type, member);			\
	     &var->member != (head);						\
	     var = owner_of(var->member.next, type, member))

/* The successor is fetched before the body runs, so the body may free the current object.
   It must leave the successor alone. */
#define list_each_safe(var, head, type, member)					\
	for (type *var = owner_of((head)->next, type, member),			\
		  *var##_next = owner_of(var->member.next, type, member);	\
	     &var->member != (head);						\
	     var = var##_next,							\
		  var##_next = owner_of(var->member.next, type, member))

#define list_first(head, type, member)						\
	(list_empty(head) ? NULL : owner_of((head)->next, type, member))

/* Keep a list sorted on the way in. Equal keys stay in order of arrival because the scan runs from
   the back, which is also where a new timetable entry usually belongs. */
#define list_insert_sorted(head, obj, type, member, less)			\
	do {									\
		struct link *il_at = (head)->prev;				\
		while (il_at != (head) &&					\
		       less((obj), owner_of(il_at, type, member)))		\
			il_at = il_at->prev;					\
		list_insert_between(&(obj)->member, il_at, il_at->next);	\
	} while (0)

#endif
