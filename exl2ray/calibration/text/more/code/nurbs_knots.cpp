// Created on: 1996-03-12
// Part of the Anvil geometric modelling kernel

#include <BSpl_Tools.hxx>

#include <Precision.hxx>
#include <Standard_DomainError.hxx>
#include <TCollection_Array1.hxx>

//=======================================================================
//function : LocateSpan
//purpose  : Index i of the span with  knot(i) <= U < knot(i+1).
//           At the end of the curve the last span that is not empty.
//=======================================================================
Standard_Integer BSpl_Tools::LocateSpan (const Standard_Integer      theDegree,
                                         const TCollection_Array1<Standard_Real>& theFlat,
                                         const Standard_Real         theU)
{
  Standard_Integer aLow  = theFlat.Lower() + theDegree;
  Standard_Integer aHigh = theFlat.Upper() - theDegree;

  if (theU >= theFlat (aHigh))
  {
    while (aHigh - 1 > aLow && theFlat (aHigh - 1) >= theFlat (aHigh))
    {
      --aHigh;
    }
    return aHigh - 1;
  }

  while (aHigh - aLow > 1)
  {
    const Standard_Integer aMid = (aLow + aHigh) / 2;
    if (theU < theFlat (aMid))
    {
      aHigh = aMid;
    }
    else
    {
      aLow = aMid;
    }
  }
  return aLow;
}

//=======================================================================
//function : Basis
//purpose  : The degree + 1 basis functions that differ from zero at U.
//=======================================================================
void BSpl_Tools::Basis (const Standard_Integer theSpan,
                        const Standard_Integer theDegree,
                        const TCollection_Array1<Standard_Real>& theFlat,
                        const Standard_Real    theU,
                        Standard_Real*         theN)
{
  Standard_Real aLeft [MaxDegree + 1];
  Standard_Real aRight[MaxDegree + 1];

  theN[0] = 1.0;
  for (Standard_Integer j = 1; j <= theDegree; ++j)
  {
    aLeft [j] = theU - theFlat (theSpan + 1 - j);
    aRight[j] = theFlat (theSpan + j) - theU;

    Standard_Real aSaved = 0.0;
    for (Standard_Integer r = 0; r < j; ++r)
    {
      const Standard_Real aTemp = theN[r] / (aRight[r + 1] + aLeft[j - r]);
      theN[r] = aSaved + aRight[r + 1] * aTemp;
      aSaved  = aLeft[j - r] * aTemp;
    }
    theN[j] = aSaved;
  }
}

//=======================================================================
//function : InsertKnot
//purpose  : Boehm's algorithm. The shape of the curve stays, it only gets
//           one more pole for each time that the knot is inserted.
//           Returns how many times it was, in view of its multiplicity.
//=======================================================================
Standard_Integer BSpl_Tools::InsertKnot (BSpl_CurveData&        theCurve,
                                         const Standard_Real    theU,
                                         const Standard_Integer theTimes,
                                         const Standard_Real    theTolerance)
{
  const Standard_Integer aDegree = theCurve.Degree;
  const Standard_Integer aFirst  = theCurve.Flat.Lower() + aDegree;
  const Standard_Integer aLast   = theCurve.Flat.Upper() - aDegree;

  if (theU < theCurve.Flat (aFirst) - theTolerance
   || theU > theCurve.Flat (aLast)  + theTolerance)
  {
    throw Standard_DomainError ("BSpl_Tools::InsertKnot: parameter out of range");
  }

  // Snap to a knot that is there already: two knots a hair apart would
  // ruin the conditioning of everything that follows.
  Standard_Real    aU = theU;
  Standard_Integer aMult = 0;
  for (Standard_Integer i = theCurve.Flat.Lower(); i <= theCurve.Flat.Upper(); ++i)
  {
    if (Abs (theCurve.Flat (i) - theU) <= theTolerance)
    {
      aU = theCurve.Flat (i);
      ++aMult;
    }
  }

  const Standard_Integer aNbNew = Min (theTimes, aDegree - aMult);
  for (Standard_Integer n = 0; n < aNbNew; ++n, ++aMult)
  {
    const Standard_Integer k = LocateSpan (aDegree, theCurve.Flat, aU);
    BSpl_PoleArray aPoles (1, theCurve.Poles.Length() + 1);

    for (Standard_Integer i = 1; i <= aPoles.Upper(); ++i)
    {
      if (i <= k - aDegree)
      {
        aPoles (i) = theCurve.Poles (i);
      }
      else if (i > k - aMult)
      {
        aPoles (i) = theCurve.Poles (i - 1);
      }
      else
      {
        const Standard_Real anAlpha = (aU - theCurve.Flat (i))
                                    / (theCurve.Flat (i + aDegree) - theCurve.Flat (i));
        aPoles (i) = theCurve.Poles (i - 1) * (1.0 - anAlpha)
                   + theCurve.Poles (i)     * anAlpha;
      }
    }

    theCurve.Poles = aPoles;
    theCurve.Flat.InsertAfter (k, aU);
  }

  return aNbNew > 0 ? aNbNew : 0;
}
