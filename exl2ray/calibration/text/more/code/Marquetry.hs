{-# LANGUAGE DerivingStrategies #-}
{-# LANGUAGE GeneralizedNewtypeDeriving #-}
{-# LANGUAGE LambdaCase #-}
{-# LANGUAGE TupleSections #-}

-- | Cutting veneers from leaves with as little waste as a guillotine allows.
--
-- Every cut goes from edge to edge, because the workshop has a guillotine and not a jigsaw. Pieces may be turned by a
-- half turn but not by a quarter: the grain has a direction. The search is exact for a handful of pieces and falls back
-- to a beam for more.
module Marquetry
  ( Mm (..)
  , Piece (..)
  , Leaf (..)
  , Cut (..)
  , plan
  , waste
  , prop_piecesSurvive
  ) where

import Control.Monad (guard)
import Data.List (foldl', sortOn)
import Data.List.NonEmpty (NonEmpty (..))
import qualified Data.List.NonEmpty as NE
import Data.Ord (Down (..))
import qualified Data.Set as Set

newtype Mm = Mm Int
  deriving stock (Eq, Ord)
  deriving newtype (Show, Num, Enum, Real, Integral)

data Piece = Piece
  { pieceName :: String
  , along     :: !Mm      -- ^ with the grain
  , across    :: !Mm
  }
  deriving stock (Eq, Ord, Show)

data Leaf = Leaf { leafAlong, leafAcross :: !Mm }
  deriving stock (Eq, Ord, Show)

-- | A finished leaf is a binary tree: cut it somewhere, then deal with the two parts.
data Cut
  = AcrossGrain !Mm Cut Cut
  | WithGrain !Mm Cut Cut
  | Use Piece
  | Offcut Leaf
  deriving stock (Eq, Show)

-- | The knife takes nothing away, but the fence cannot be set finer than this.
fence :: Mm
fence = 1

area :: Leaf -> Int
area (Leaf a b) = fromIntegral a * fromIntegral b

waste :: Cut -> Int
waste = \case
  AcrossGrain _ l r -> waste l + waste r
  WithGrain _ l r   -> waste l + waste r
  Use _             -> 0
  Offcut leaf       -> area leaf

pieces :: Cut -> [Piece]
pieces = \case
  AcrossGrain _ l r -> pieces l <> pieces r
  WithGrain _ l r   -> pieces l <> pieces r
  Use p             -> [p]
  Offcut _          -> []

-- | Both ways of freeing a piece from the corner of a leaf. The order of the two cuts decides which offcut is the long one.
corner :: Leaf -> Piece -> [(Cut -> Cut -> Cut, Leaf, Leaf)]
corner (Leaf la lb) p@(Piece _ a b) = do
  guard (a <= la && b <= lb)
  [ ( \rest side -> trimA (trimB (Use p) side) rest, Leaf (la - a) lb, Leaf a (lb - b) )
    , ( \rest side -> trimB (trimA (Use p) side) rest, Leaf la (lb - b), Leaf (la - a) b ) ]
  where
    trimA inner rest | la - a < fence = inner
                     | otherwise      = AcrossGrain a inner rest
    trimB inner rest | lb - b < fence = inner
                     | otherwise      = WithGrain b inner rest

-- | A state of the search: leaves still whole, and a function that will build the tree once their fates are known.
data Partial = Partial
  { open  :: [Leaf]
  , build :: [Cut] -> Cut
  , lost  :: !Int
  }

-- | Places pieces largest first; keeps the @width@ states with the least scattered offcuts.
plan :: Int -> Leaf -> NonEmpty Piece -> Maybe Cut
plan width leaf wanted = finish <$> NE.nonEmpty final
  where
    order = sortOn (Down . \p -> (max (along p) (across p), min (along p) (across p))) (NE.toList wanted)
    start = [Partial [leaf] head' 0]
    head' = \case
      [c] -> c
      cs  -> error ("one leaf, " <> show (length cs) <> " fates")
    final  = foldl' (\states p -> prune (concatMap (place p) states)) start order
    prune  = take width . dedupe . sortOn lost
    dedupe = go Set.empty
      where
        go _ [] = []
        go seen (s : ss)
          | key `Set.member` seen = go seen ss
          | otherwise             = s : go (Set.insert key seen) ss
          where key = sortOn Down (open s)
    finish (s :| _) = build s (map Offcut (open s))

place :: Piece -> Partial -> [Partial]
place p s = do
  (before, leaf, after) <- picks (open s)
  (mk, restLeaf, sideLeaf) <- corner leaf p
  let opened = restLeaf : sideLeaf : []
      n = length before
  pure Partial
    { open  = before <> opened <> after
    , build = \cuts -> case splitAt n cuts of
        (cb, rest : side : ca) -> build s (cb <> (mk rest side : ca))
        _                      -> error "as many fates as open leaves"
    , lost  = sum [area l | l <- before <> opened <> after, slim l]
    }

-- | An offcut narrower than a thumb is firewood, and counts as lost at once.
slim :: Leaf -> Bool
slim (Leaf a b) = min a b < 25

picks :: [a] -> [([a], a, [a])]
picks = \case
  []     -> []
  x : xs -> ([], x, xs) : [(x : b, y, a) | (b, y, a) <- picks xs]

prop_piecesSurvive :: Leaf -> NonEmpty Piece -> Bool
prop_piecesSurvive leaf ps = case plan 50 leaf ps of
  Nothing  -> True
  Just cut -> sortOn pieceName (pieces cut) == sortOn pieceName (NE.toList ps)
           && waste cut + sum (map (\p -> area (Leaf (along p) (across p))) (pieces cut)) == area leaf
