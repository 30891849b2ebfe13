/******************************************************************************
 * Project:  Tessera Geospatial Library
 * Purpose:  Reading polygon records of shapefiles.
 ******************************************************************************
 * SPDX-License-Identifier: MIT
 *****************************************************************************/

#include "ts_port.h"
#include "ts_error.h"
#include "ts_geom.h"
#include "shp_reader.h"

/* Byte offsets inside the content of a polygon record. */
#define OFF_TYPE      0
#define OFF_BOX       4
#define OFF_NPARTS   36
#define OFF_NPOINTS  40
#define OFF_PARTS    44

#define SHPT_NULL      0
#define SHPT_POLYGON   5
#define SHPT_POLYGONZ 15
#define SHPT_POLYGONM 25

/************************************************************************/
/*                            SignedArea()                              */
/*                                                                      */
/*      Twice the area; negative for clockwise rings. Coordinates are   */
/*      taken relative to the first vertex: with projected coordinates  */
/*      of seven digits the plain formula loses half of the mantissa.   */
/************************************************************************/

static double SignedArea( const TSPoint *pasPt, int nPt )
{
    double dfSum = 0.0;
    int    i;

    for( i = 1; i < nPt - 1; i++ )
    {
        const double dx1 = pasPt[i].x - pasPt[0].x;
        const double dy1 = pasPt[i].y - pasPt[0].y;
        const double dx2 = pasPt[i+1].x - pasPt[0].x;
        const double dy2 = pasPt[i+1].y - pasPt[0].y;

        dfSum += dx1 * dy2 - dx2 * dy1;
    }
    return dfSum;
}

/************************************************************************/
/*                           PointInRing()                              */
/************************************************************************/

static int PointInRing( const TSPoint *psPt, const TSPoint *pasRing, int nPt )
{
    int i, j, bInside = FALSE;

    for( i = 0, j = nPt - 1; i < nPt; j = i++ )
    {
        if( (pasRing[i].y > psPt->y) != (pasRing[j].y > psPt->y)
            && psPt->x < (pasRing[j].x - pasRing[i].x)
                         * (psPt->y - pasRing[i].y)
                         / (pasRing[j].y - pasRing[i].y) + pasRing[i].x )
            bInside = !bInside;
    }
    return bInside;
}

/************************************************************************/
/*                          FindOuterRing()                             */
/*                                                                      */
/*      The smallest clockwise ring that contains the hole. A hole may  */
/*      touch its outer ring in one vertex, so several are asked.       */
/************************************************************************/

static int FindOuterRing( const SHPRing *pasRing, int nRings, int iHole )
{
    const SHPRing *psHole = pasRing + iHole;
    int iBest = -1, i, k;

    for( i = 0; i < nRings; i++ )
    {
        int nVotes = 0, nAsked = 0;

        if( pasRing[i].bHole || !TSBoxContains( &pasRing[i].sBox, &psHole->sBox ) )
            continue;

        for( k = 0; k < psHole->nPt && nAsked < 5; k++, nAsked++ )
            nVotes += PointInRing( psHole->pasPt + k, pasRing[i].pasPt, pasRing[i].nPt );

        if( nVotes * 2 > nAsked
            && (iBest < 0 || fabs(pasRing[i].dfArea) < fabs(pasRing[iBest].dfArea)) )
            iBest = i;
    }
    return iBest;
}

/************************************************************************/
/*                          SHPReadPolygon()                            */
/************************************************************************/

TSGeometry *SHPReadPolygon( const GByte *pabyRec, size_t nBytes, GIntBig nFID )
{
    TSGeometry *poMulti = NULL;
    TSGeometry **papoPoly = NULL;
    SHPRing    *pasRing = NULL;
    TSPoint    *pasPt = NULL;
    GInt32      nType, nParts, nPoints;
    int         i;

    if( nBytes < 4 )
        goto corrupt;

    nType = TSGetLE32( pabyRec + OFF_TYPE );
    if( nType == SHPT_NULL )
        return NULL;
    if( nType != SHPT_POLYGON && nType != SHPT_POLYGONZ && nType != SHPT_POLYGONM )
    {
        TSError( TSE_Failure, TSE_AppDefined,
                 "Feature " TS_FRMT_GIB " has shape type %d in a polygon file.",
                 nFID, nType );
        return NULL;
    }
    if( nBytes < OFF_PARTS )
        goto corrupt;

    nParts  = TSGetLE32( pabyRec + OFF_NPARTS );
    nPoints = TSGetLE32( pabyRec + OFF_NPOINTS );

    /* The counts come from the file. Divide, don't multiply. */
    if( nParts <= 0 || nPoints < 0
        || (size_t) nParts > (nBytes - OFF_PARTS) / 4
        || (size_t) nPoints > (nBytes - OFF_PARTS - 4 * (size_t) nParts) / 16 )
        goto corrupt;

    pasPt    = (TSPoint *)     VSIMalloc2( nPoints + 1, sizeof(TSPoint) );
    pasRing  = (SHPRing *)     VSICalloc( nParts, sizeof(SHPRing) );
    papoPoly = (TSGeometry **) VSICalloc( nParts, sizeof(TSGeometry *) );
    if( !pasPt || !pasRing || !papoPoly )
    {
        TSError( TSE_Failure, TSE_OutOfMemory,
                 "Feature " TS_FRMT_GIB ": no memory for %d vertices.", nFID, nPoints );
        goto done;
    }

    for( i = 0; i < nPoints; i++ )
    {
        const GByte *p = pabyRec + OFF_PARTS + 4 * (size_t) nParts + 16 * (size_t) i;

        pasPt[i].x = TSGetLEDouble( p );
        pasPt[i].y = TSGetLEDouble( p + 8 );
    }

    for( i = 0; i < nParts; i++ )
    {
        GInt32 nStart = TSGetLE32( pabyRec + OFF_PARTS + 4 * i );
        GInt32 nEnd   = i + 1 < nParts ? TSGetLE32( pabyRec + OFF_PARTS + 4 * (i + 1) )
                                       : nPoints;

        if( nStart < 0 || nEnd < nStart || nEnd > nPoints )
            goto corrupt;

        pasRing[i].pasPt  = pasPt + nStart;
        pasRing[i].nPt    = nEnd - nStart;
        pasRing[i].dfArea = SignedArea( pasRing[i].pasPt, pasRing[i].nPt );
        pasRing[i].bHole  = pasRing[i].dfArea > 0.0;
        TSBoxFromPoints( &pasRing[i].sBox, pasRing[i].pasPt, pasRing[i].nPt );
    }

    poMulti = TSNewGeometry( TS_MultiPolygon );

    for( i = 0; i < nParts; i++ )
    {
        if( pasRing[i].bHole || pasRing[i].nPt < 4 )
            continue;
        papoPoly[i] = TSNewGeometry( TS_Polygon );
        TSPolygonAddRing( papoPoly[i], pasRing[i].pasPt, pasRing[i].nPt );
        TSMultiAdd( poMulti, papoPoly[i] );
    }

    for( i = 0; i < nParts; i++ )
    {
        int iOuter;

        if( !pasRing[i].bHole || pasRing[i].nPt < 4 )
            continue;

        iOuter = FindOuterRing( pasRing, nParts, i );
        if( iOuter >= 0 && papoPoly[iOuter] )
            TSPolygonAddRing( papoPoly[iOuter], pasRing[i].pasPt, pasRing[i].nPt );
        else
        {
            /* Some writers don't care about direction: an orphan is an outer ring. */
            TSDebug( "SHP", "Feature " TS_FRMT_GIB ": hole %d lies in no ring.", nFID, i );
            papoPoly[i] = TSNewGeometry( TS_Polygon );
            TSPolygonAddRing( papoPoly[i], pasRing[i].pasPt, pasRing[i].nPt );
            TSMultiAdd( poMulti, papoPoly[i] );
        }
    }
    goto done;

corrupt:
    TSError( TSE_Failure, TSE_FileIO, "Feature " TS_FRMT_GIB ": record is corrupt.", nFID );

done:
    VSIFree( pasPt );
    VSIFree( pasRing );
    VSIFree( papoPoly );
    return poMulti;
}
