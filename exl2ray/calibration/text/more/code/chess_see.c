#include "bitboard.h"
#include "position.h"
#include "see.h"

/* Centipawns; the king only has to be dearer than everything else together. */
static const int SeeValue[PIECE_TYPE_NB] = { 0, 100, 325, 330, 510, 970, 20000 };

/// Finds the least valuable of the attackers and takes it off the board.
/// Sliders that were standing behind it are added to *attackers.
static PieceType pop_least(const Position *pos, Color us, Square to,
                           Bitboard *occupied, Bitboard *attackers)
{
    for (PieceType pt = PAWN; pt <= KING; pt++) {
        Bitboard b = *attackers & pieces(pos, us, pt);
        if (!b)
            continue;

        *occupied ^= b & -b;

        if (pt == PAWN || pt == BISHOP || pt == QUEEN)
            *attackers |= attacks_bishop(to, *occupied) & diagonal_sliders(pos);
        if (pt == ROOK || pt == QUEEN)
            *attackers |= attacks_rook(to, *occupied) & straight_sliders(pos);

        *attackers &= *occupied;
        return pt;
    }
    return NO_PIECE_TYPE;
}

/// Static exchange evaluation: what does the side to move gain if both sides
/// go on capturing on the target square, always with the cheapest piece, and
/// either may stop when going on would lose material?
///
/// Pins are not looked at, promotions in the middle of an exchange neither.
/// Both errors are rare and small compared with the cost of getting them right.
int see(const Position *pos, Move m)
{
    int gain[32];
    int d = 0;
    Square from = from_sq(m), to = to_sq(m);
    Color side = pos->side_to_move;
    Bitboard occupied = pos->all ^ sq_bb(from);
    PieceType moving = type_of(pos->board[from]);

    switch (type_of_move(m)) {
    case CASTLING:
        return 0;
    case EN_PASSANT:
        occupied ^= sq_bb(to ^ 8);
        gain[0] = SeeValue[PAWN];
        break;
    case PROMOTION:
        moving = promotion_type(m);
        gain[0] = SeeValue[type_of(pos->board[to])] + SeeValue[moving] - SeeValue[PAWN];
        break;
    default:
        gain[0] = SeeValue[type_of(pos->board[to])];
    }

    Bitboard attackers = attackers_to(pos, to, occupied) & occupied;

    for (;;) {
        side = !side;
        if (!(attackers & pos->by_color[side]))
            break;

        d++;
        gain[d] = SeeValue[moving] - gain[d - 1];

        // Neither stopping nor going on can change the sign of the result.
        if (max(-gain[d - 1], gain[d]) < 0)
            break;

        moving = pop_least(pos, side, to, &occupied, &attackers);

        // A king may not recapture into check.
        if (moving == KING && (attackers & pos->by_color[!side])) {
            d--;
            break;
        }
    }

    while (d > 0) {
        gain[d - 1] = -max(-gain[d - 1], gain[d]);
        d--;
    }
    return gain[0];
}

/// The question that the search asks most often, answered sooner.
bool see_ge(const Position *pos, Move m, int threshold)
{
    if (type_of_move(m) != NORMAL)
        return see(pos, m) >= threshold;

    Square from = from_sq(m), to = to_sq(m);

    int balance = SeeValue[type_of(pos->board[to])] - threshold;
    if (balance < 0)
        return false;

    balance -= SeeValue[type_of(pos->board[from])];
    if (balance >= 0)
        return true;

    return see(pos, m) >= threshold;
}
