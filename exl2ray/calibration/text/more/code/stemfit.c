/****************************************************************************
 *
 *   stemfit.c
 *
 *     Fitting of stems to the pixel grid (body).
 *
 *   All coordinates are 26.6 fixed point unless called `font units'.
 *
 */


#include "gridfit/stemfit.h"
#include "gridfit/blues.h"
#include "base/gfcalc.h"


#define PIX_FLOOR( x )  ( (x) & ~63 )
#define PIX_ROUND( x )  PIX_FLOOR( (x) + 32 )


  /* A stem narrower than this looks grey whatever we do. */
#define MIN_STEM_WIDTH  48


  /*
   * Choose the width, in 1/64 pixels, at which a stem is drawn.
   *
   * Near the standard width of the font all stems get exactly the same
   * width; what was a deliberate difference of a few units on paper is
   * plain noise at twelve pixels.
   */
  static GF_Pos
  stem_width( GF_Axis*  axis,
              GF_Pos    width,
              GF_UInt   flags )
  {
    GF_Pos  dist = GF_ABS( width );
    GF_Pos  delta;


    if ( !( flags & GF_STEM_ADJUST ) || axis->extra_light )
      return width;

    delta = GF_ABS( dist - axis->standard_width );
    if ( delta * 5 < axis->standard_width )
      dist = axis->standard_width;

    /* Pull towards whole pixels, the harder the smaller the size. */
    dist += GF_MulDiv( PIX_ROUND( dist ) - dist, axis->snap_strength, 64 );
    dist  = GF_MAX( dist, MIN_STEM_WIDTH );

    return width < 0 ? -dist : dist;
  }


  /*
   * Place one stem.  If one of its edges lies in an alignment zone, that
   * edge goes where the zone is and the other follows; otherwise the centre
   * stays as near as possible to where the designer had it.
   */
  static void
  place_stem( GF_Axis*  axis,
              GF_Stem*  stem )
  {
    GF_Pos  lo    = GF_MulFix( stem->lo, axis->scale ) + axis->delta;
    GF_Pos  hi    = GF_MulFix( stem->hi, axis->scale ) + axis->delta;
    GF_Pos  width = stem_width( axis, hi - lo, stem->flags );
    GF_Pos  centre, left, err_floor, err_ceil;


    if ( stem->lo_zone )
    {
      stem->lo_fit = stem->lo_zone->fit;
      stem->hi_fit = stem->lo_fit + width;
    }
    else if ( stem->hi_zone )
    {
      stem->hi_fit = stem->hi_zone->fit;
      stem->lo_fit = stem->hi_fit - width;
    }
    else
    {
      centre = ( lo + hi ) / 2;
      left   = centre - width / 2;

      /* snap whichever edge is less trouble */
      err_floor = GF_ABS( PIX_ROUND( left ) - left );
      err_ceil  = GF_ABS( PIX_ROUND( left + width ) - ( left + width ) );

      if ( err_floor <= err_ceil )
        stem->lo_fit = PIX_ROUND( left );
      else
        stem->lo_fit = PIX_ROUND( left + width ) - width;

      stem->hi_fit = stem->lo_fit + width;
    }

    stem->flags |= GF_STEM_DONE;
  }


  /*
   * Three stems at equal distances, as in `m' or `E', must remain at equal
   * distances.  The outer ones are placed first and the middle one is put
   * between them; an odd number of pixels is shared out by moving the right
   * one.
   */
  static void
  balance_triple( GF_Stem*  a,
                  GF_Stem*  b,
                  GF_Stem*  c )
  {
    GF_Pos  gap1, gap2, shift;
    GF_Pos  u1 = b->lo - a->lo;
    GF_Pos  u2 = c->lo - b->lo;


    if ( GF_ABS( u1 - u2 ) > 5 )        /* font units */
      return;

    gap1  = b->lo_fit - a->lo_fit;
    gap2  = c->lo_fit - b->lo_fit;
    shift = gap2 - gap1;

    if ( shift == 0 || c->hi_zone || c->lo_zone )
      return;

    c->lo_fit -= shift;
    c->hi_fit -= shift;
  }


  GF_LOCAL_DEF( void )
  gf_fit_stems( GF_Glyph*  glyph,
                GF_Axis*   axis )
  {
    GF_Stem*  stems = axis->stems;
    GF_UInt   n;


    /* those in alignment zones first: they are not negotiable */
    for ( n = 0; n < axis->num_stems; n++ )
      if ( stems[n].lo_zone || stems[n].hi_zone )
        place_stem( axis, stems + n );

    for ( n = 0; n < axis->num_stems; n++ )
    {
      if ( stems[n].flags & GF_STEM_DONE )
        continue;

      place_stem( axis, stems + n );

      /* never let two stems swap places or merge */
      if ( n > 0 && stems[n].lo_fit < stems[n - 1].hi_fit + 32 )
      {
        GF_Pos  w = stems[n].hi_fit - stems[n].lo_fit;


        GF_TRACE5(( "stem %d of glyph %u pushed away\n", n, glyph->index ));
        stems[n].lo_fit = PIX_ROUND( stems[n - 1].hi_fit + 64 );
        stems[n].hi_fit = stems[n].lo_fit + w;
      }
    }

    if ( axis->dim == GF_DIM_HORZ && axis->num_stems == 3 )
      balance_triple( stems, stems + 1, stems + 2 );

    gf_interpolate_points( glyph, axis );
  }


/* END */
