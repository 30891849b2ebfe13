{-# LANGUAGE DerivingStrategies #-}
{-# LANGUAGE OverloadedStrings #-}
{-# LANGUAGE TupleSections #-}

-- | Crop rotation as a constraint problem: which vegetable goes in which bed, year after year, such
-- that no family returns to a bed too early and hungry crops follow the beans.
module Main (main) where

import Control.Monad (forM_, guard, unless)
import Data.List (minimumBy, sortOn)
import Data.Map.Strict (Map)
import qualified Data.Map.Strict as Map
import Data.Maybe (mapMaybe)
import Data.Ord (comparing)
import Data.Text (Text)
import qualified Data.Text as T
import qualified Data.Text.IO as T
import System.Exit (exitFailure)

data Family = Brassica | Legume | Allium | Nightshade | Umbellifer | Cucurbit | Chenopod
  deriving stock (Eq, Ord, Show, Enum, Bounded)

data Hunger = Light | Medium | Heavy
  deriving stock (Eq, Ord, Show)

data Crop = Crop
  { cropName :: Text
  , family :: Family
  , hunger :: Hunger
  , wantsSun :: Bool
  }
  deriving stock (Eq, Ord, Show)

newtype Bed = Bed Int
  deriving stock (Eq, Ord)

instance Show Bed where
  show (Bed n) = "bed " <> show n

newtype Year = Year Int
  deriving stock (Eq, Ord)
  deriving newtype (Show, Enum)

-- | What may not stand where: the number of years before a family comes back.
rest :: Family -> Int
rest Brassica = 4 -- clubroot
rest Allium = 3
rest Nightshade = 3
rest Legume = 2
rest _ = 1

type Slot = (Year, Bed)
type Plan = Map Slot Crop
type Domains = Map Slot [Crop]

shaded :: [Bed]
shaded = [Bed 5]

-- | Is this crop fine in this slot, given everything planted so far?
allowed :: Plan -> Slot -> Crop -> Bool
allowed plan (Year y, bed) crop = sunOk && familyOk && hungerOk && onlyOnce
  where
    sunOk = not (wantsSun crop && bed `elem` shaded)
    familyOk = and
      [ family other /= family crop
      | (Year y', other) <- history
      , abs (y - y') <= rest (family crop)
      ]
    hungerOk = case Map.lookup (Year (y - 1), bed) plan of
      Just before -> not (hunger before == Heavy && hunger crop == Heavy)
      Nothing -> True
    onlyOnce = crop `notElem` [c | ((Year y', _), c) <- Map.toList plan, y' == y]
    history = [(y', c) | ((y', b), c) <- Map.toList plan, b == bed]

-- | Backtracking with the smallest domain first; domains are recomputed rather than trailed, the
-- garden has six beds.
solve :: Plan -> Domains -> [Plan]
solve plan domains
  | Map.null domains = [plan]
  | otherwise = do
      let (slot, choices) = minimumBy (comparing (length . snd)) (Map.toList domains)
      crop <- sortOn (preference plan slot) choices
      let plan' = Map.insert slot crop plan
          domains' = Map.mapWithKey (filter . allowed plan') (Map.delete slot domains)
      guard (not (any null domains'))
      solve plan' domains'

-- | Heavy feeders like to come after beans and peas; smaller is better.
preference :: Plan -> Slot -> Crop -> (Int, Text)
preference plan (Year y, bed) crop = (score, cropName crop)
  where
    score = case (hunger crop, family <$> Map.lookup (Year (y - 1), bed) plan) of
      (Heavy, Just Legume) -> 0
      (Light, Just Legume) -> 2
      _ -> 1

crops :: [Crop]
crops =
  [ Crop "broad beans" Legume Light False
  , Crop "peas" Legume Light False
  , Crop "kale" Brassica Heavy False
  , Crop "leeks" Allium Medium True
  , Crop "potatoes" Nightshade Heavy True
  , Crop "carrots" Umbellifer Medium True
  , Crop "courgettes" Cucurbit Heavy True
  , Crop "chard" Chenopod Medium False
  ]

beds :: [Bed]
beds = map Bed [1 .. 6]

-- | Last year, from the notebook. Bed 3 lay under a tarpaulin.
lastYear :: Year -> Plan
lastYear y = Map.fromList $ map (\(b, c) -> ((y, Bed b), c)) $ mapMaybe known
  [(1, "potatoes"), (2, "kale"), (4, "peas"), (5, "chard"), (6, "leeks")]
  where
    known (b, name) = (b,) <$> lookup name [(cropName c, c) | c <- crops]

main :: IO ()
main = do
  let start = Year 2024
      years = take 3 [succ start ..]
      history = lastYear start
      open = Map.fromList
        [ (slot, filter (allowed history slot) crops)
        | y <- years, b <- beds, let slot = (y, b)
        ]
      solutions = solve history open
  unless (any (const True) solutions) $ do
    T.putStrLn "No rotation: dig another bed or eat less kale."
    exitFailure
  let plan = head solutions
  forM_ (start : years) $ \y -> do
    T.putStr (T.pack (show y) <> "  ")
    T.putStrLn $ T.unwords
      [ T.justifyLeft 13 ' ' (maybe "-" cropName (Map.lookup (y, b) plan)) | b <- beds ]
