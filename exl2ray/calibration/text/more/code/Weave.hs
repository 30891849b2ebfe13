{-# LANGUAGE LambdaCase #-}

-- | Drafts for a handloom: from threading, tie-up and treadling to the picture in the cloth.
--
-- A warp thread is drawn through one of the shafts. A treadle lifts the shafts tied to it. Where the warp thread
-- of a column is lifted the warp shows, elsewhere the weft does. The whole drawdown is therefore one product of
-- three relations, and most of this module is about reading drafts and finding mistakes in them.
module Weave
  ( Draft (..), Face (..), Fault (..)
  , drawdown, faults, floats, mirrored, render
  ) where

import Data.List (group, transpose)
import qualified Data.Map.Strict as Map
import qualified Data.Set as Set

type Shaft = Int
type Treadle = Int

data Draft = Draft
  { threading :: [Shaft]                          -- ^ one entry per warp thread, left to right
  , tieUp     :: Map.Map Treadle (Set.Set Shaft)
  , treadling :: [Treadle]                        -- ^ one entry per pick, in the order of weaving
  } deriving (Eq, Show)

data Face = Warp | Weft deriving (Eq, Ord, Show)

data Fault
  = UntiedTreadle Treadle
  | IdleShaft Shaft           -- ^ threaded, but no treadle in use ever lifts it
  | StuckShaft Shaft          -- ^ lifted by every pick: those warp threads lie loose on top
  | LongFloat Int
  deriving (Eq, Show)

-- | Rows are picks, first pick first.
drawdown :: Draft -> [[Face]]
drawdown d = [ [ if s `Set.member` up then Warp else Weft | s <- threading d ] | up <- lifts d ]

lifts :: Draft -> [Set.Set Shaft]
lifts d = [ Map.findWithDefault Set.empty t (tieUp d) | t <- treadling d ]

-- | Longest float on either face, along rows (weft) and along columns (warp).
floats :: Draft -> Int
floats d = maximum (0 : concatMap runs (cloth ++ transpose cloth))
  where
    cloth = drawdown d
    runs  = map length . group

-- | Everything worth a warning, given the longest float the weaver will tolerate.
faults :: Int -> Draft -> [Fault]
faults limit d = concat
  [ [ UntiedTreadle t | t <- uniq (treadling d), t `Map.notMember` tieUp d ]
  , [ IdleShaft s | s <- shafts, s `Set.notMember` Set.unions up ]
  , [ StuckShaft s | not (null up), s <- shafts, all (Set.member s) up ]
  , [ LongFloat n | let n = floats d, n > limit ]
  ]
  where
    up     = lifts d
    shafts = uniq (threading d)
    uniq   = Set.toList . Set.fromList

-- | Point repeat: the threading runs to its end and back, without doubling the turning threads.
mirrored :: Draft -> Draft
mirrored d = d { threading = bounce (threading d), treadling = bounce (treadling d) }
  where
    bounce xs = xs ++ drop 1 (reverse (drop 1 xs))

render :: Draft -> String
render = unlines . map (map ink) . reverse . drawdown
  where
    ink = \case
      Warp -> '█'
      Weft -> '·'
