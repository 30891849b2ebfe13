#include "quern.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The interpreter loop of Quern, the formula language of the mill's blending desk. Values are NaN-boxed:
// a double is itself, everything else hides in the payload of a quiet NaN with the sign bit set.

#define TAG_MASK   0xffff000000000000ull
#define TAG_NIL    0xfff8000000000000ull
#define TAG_BOOL   0xfff9000000000000ull
#define TAG_STR    0xfffa000000000000ull
#define TAG_FN     0xfffb000000000000ull
#define PAYLOAD(v) ((void *)(uintptr_t)((v) & ~TAG_MASK))

static inline bool   is_num(qval v)  { return v < TAG_NIL; }
static inline double as_num(qval v)  { double d; memcpy(&d, &v, 8); return d; }
static inline bool   truthy(qval v)  { return v != TAG_NIL && v != TAG_BOOL; }
static inline qval   box_bool(bool b) { return TAG_BOOL | b; }

static inline qval box_num(double d)
{
    qval v;
    if (d != d)
        return 0x7ff8000000000000ull;   // any NaN becomes the one positive NaN, else it could look like a pointer
    memcpy(&v, &d, 8);
    return v;
}

_Noreturn static void throw_at(struct vm *vm, const uint8_t *ip, const char *fmt, ...)
{
    va_list ap;
    const struct fn *f = vm->frame->fn;
    int n = snprintf(vm->message, sizeof vm->message, "%s, line %d: ", f->name, f->lines[ip - f->code - 1]);

    va_start(ap, fmt);
    vsnprintf(vm->message + n, sizeof vm->message - n, fmt, ap);
    va_end(ap);
    longjmp(vm->bail, 1);
}

static const char *kind(qval v)
{
    if (is_num(v)) return "a number";
    switch (v & TAG_MASK) {
    case TAG_NIL:  return "nothing";
    case TAG_BOOL: return "a yes/no value";
    case TAG_STR:  return "a text";
    default:       return "a function";
    }
}

static bool equal(qval a, qval b)
{
    if (is_num(a) && is_num(b))
        return as_num(a) == as_num(b);
    if ((a & TAG_MASK) == TAG_STR && (b & TAG_MASK) == TAG_STR) {
        const struct str *s = PAYLOAD(a), *t = PAYLOAD(b);
        return s == t || (s->hash == t->hash && s->len == t->len && !memcmp(s->text, t->text, s->len));
    }
    return a == b;
}

#if defined(__GNUC__)
#  define DISPATCH()  do { if (--fuel == 0) goto out_of_fuel; goto *labels[*ip++]; } while (0)
#  define CASE(op)    L_##op
#else
#  error "only the computed-goto build is maintained"
#endif

#define PUSH(v)  (*sp++ = (v))
#define POP()    (*--sp)
#define U16()    (ip += 2, (uint16_t)(ip[-2] | ip[-1] << 8))

#define ARITH(expr, verb)                                                               \
    do {                                                                                \
        qval b_ = sp[-1], a_ = sp[-2];                                                  \
        if (!is_num(a_) || !is_num(b_))                                                 \
            throw_at(vm, ip, "cannot " verb " %s and %s", kind(a_), kind(b_));          \
        double a = as_num(a_), b = as_num(b_);                                          \
        sp--;                                                                           \
        sp[-1] = (expr);                                                                \
        DISPATCH();                                                                     \
    } while (0)

enum quern_status quern_call(struct vm *vm, const struct fn *entry, qval *result)
{
    static const void *const labels[] = {
#define OP(name) [OP_##name] = &&L_##name,
        QUERN_OPCODES(OP)
#undef OP
    };
    register const uint8_t *ip;
    register qval *sp;
    qval *base;
    long fuel = vm->fuel;

    if (setjmp(vm->bail))
        return QUERN_ERROR;

    vm->frame = vm->frames;
    vm->frame->fn = entry;
    vm->frame->base = base = vm->stack;
    ip = entry->code;
    sp = base + entry->nlocals;
    for (qval *p = base; p < sp; p++)
        *p = TAG_NIL;
    DISPATCH();

CASE(CONST): PUSH(vm->frame->fn->consts[U16()]); DISPATCH();
CASE(NIL):   PUSH(TAG_NIL); DISPATCH();
CASE(LOAD):  PUSH(base[*ip++]); DISPATCH();
CASE(STORE): base[*ip++] = POP(); DISPATCH();
CASE(DROP):  sp--; DISPATCH();

CASE(ADD):   ARITH(box_num(a + b), "add");
CASE(SUB):   ARITH(box_num(a - b), "subtract");
CASE(MUL):   ARITH(box_num(a * b), "multiply");
CASE(POW):   ARITH(box_num(pow(a, b)), "raise");
CASE(LESS):  ARITH(box_bool(a < b), "compare");
CASE(ATMOST): ARITH(box_bool(a <= b), "compare");
CASE(DIV):
    // Blenders divide by the flow of a silo, and an empty silo has none. Infinity in a recipe is no help.
    if (is_num(sp[-1]) && as_num(sp[-1]) == 0)
        throw_at(vm, ip, "division by zero");
    ARITH(box_num(a / b), "divide");

CASE(EQUAL): {
    bool e = equal(sp[-2], sp[-1]);
    sp--;
    sp[-1] = box_bool(e);
    DISPATCH();
}
CASE(NOT):   sp[-1] = box_bool(!truthy(sp[-1])); DISPATCH();
CASE(NEG):
    if (!is_num(sp[-1]))
        throw_at(vm, ip, "cannot negate %s", kind(sp[-1]));
    sp[-1] = box_num(-as_num(sp[-1]));
    DISPATCH();

CASE(JUMP):  { uint16_t d = U16(); ip += d; DISPATCH(); }
CASE(LOOP):  { uint16_t d = U16(); ip -= d; DISPATCH(); }
CASE(UNLESS): { uint16_t d = U16(); if (!truthy(POP())) ip += d; DISPATCH(); }
CASE(ELSEPEEK): { uint16_t d = U16(); if (truthy(sp[-1])) ip += d; else sp--; DISPATCH(); }

CASE(CALL): {
    unsigned argc = *ip++;
    qval callee = sp[-1 - (int)argc];
    if ((callee & TAG_MASK) != TAG_FN)
        throw_at(vm, ip, "%s cannot be called", kind(callee));
    const struct fn *f = PAYLOAD(callee);

    if (f->native) {
        vm->frame->ip = ip;             // so that an error inside knows its line
        qval r = f->native(vm, sp - argc, argc);
        sp -= argc;
        sp[-1] = r;
        DISPATCH();
    }
    if (argc != f->arity)
        throw_at(vm, ip, "%s takes %u arguments, not %u", f->name, f->arity, argc);
    if (vm->frame == &vm->frames[QUERN_FRAMES - 1] || sp + f->need > vm->stack + QUERN_STACK)
        throw_at(vm, ip, "calls are nested too deeply");
    vm->frame->ip = ip;
    vm->frame++;
    vm->frame->fn = f;
    vm->frame->base = base = sp - argc;
    for (unsigned i = argc; i < f->nlocals; i++)
        PUSH(TAG_NIL);
    ip = f->code;
    DISPATCH();
}
CASE(RETURN): {
    qval r = POP();
    if (vm->frame == vm->frames) {
        *result = r;
        vm->fuel = fuel;
        return QUERN_OK;
    }
    sp = base;
    sp[-1] = r;                         // on top of the callee itself
    vm->frame--;
    base = vm->frame->base;
    ip = vm->frame->ip;
    DISPATCH();
}

out_of_fuel:
    snprintf(vm->message, sizeof vm->message, "%s: stopped, it runs for too long", vm->frame->fn->name);
    return QUERN_FUEL;
}
