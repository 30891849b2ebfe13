{-# LANGUAGE LambdaCase #-}

-- | Symbolic derivatives of one-variable formulas, from text to text.
--
-- >>> either id pretty (derivative <$> parseExpr "x^3 * sin(2*x)")
-- "3 * x^2 * sin(2 * x) + x^3 * cos(2 * x) * 2"
module Derive
  ( Expr (..)
  , parseExpr
  , derivative
  , simplify
  , pretty
  , eval
  ) where

import Control.Applicative (Alternative (..))
import Data.Char (isAlpha, isDigit, isSpace)
import Data.Functor (($>))

data Expr
  = Num Integer
  | X
  | Expr :+: Expr
  | Expr :*: Expr
  | Expr :^: Integer
  | Fun Name Expr
  deriving (Eq, Show)

infixl 6 :+:
infixl 7 :*:
infixr 8 :^:

data Name = Sin | Cos | Exp
  deriving (Eq, Show, Enum, Bounded)

-- Parsing ------------------------------------------------------------------

-- | A parser that remembers nothing but the remaining input. Formulas are one line long, so the
-- position of an error is recovered from the length of what is left over.
newtype Parser a = Parser { runParser :: String -> Maybe (a, String) }

instance Functor Parser where
  fmap f (Parser p) = Parser $ \s -> do
    (a, rest) <- p s
    pure (f a, rest)

instance Applicative Parser where
  pure a = Parser $ \s -> Just (a, s)
  Parser pf <*> Parser pa = Parser $ \s -> do
    (f, rest) <- pf s
    (a, rest') <- pa rest
    pure (f a, rest')

instance Monad Parser where
  Parser p >>= k = Parser $ \s -> p s >>= \(a, rest) -> runParser (k a) rest

instance Alternative Parser where
  empty = Parser (const Nothing)
  Parser p <|> Parser q = Parser $ \s -> maybe (q s) Just (p s)

spanning1 :: (Char -> Bool) -> Parser String
spanning1 ok = Parser $ \s -> case span ok s of
  ("", _) -> Nothing
  (word, rest) -> Just (word, dropWhile isSpace rest)

symbol :: Char -> Parser ()
symbol c = Parser $ \case
  d : rest | c == d -> Just ((), dropWhile isSpace rest)
  _ -> Nothing

-- | Left-associative chain; folding while parsing avoids the left recursion of the grammar.
chainl1 :: Parser a -> Parser (a -> a -> a) -> Parser a
chainl1 term op = term >>= go
  where
    go acc = (do f <- op; t <- term; go (f acc t)) <|> pure acc

expr, product', power, atom :: Parser Expr
expr = chainl1 product' ((symbol '+' $> (:+:)) <|> (symbol '-' $> minus))
  where minus a b = a :+: (Num (-1) :*: b)
product' = chainl1 power (symbol '*' $> (:*:))
power = do
  base <- atom
  (symbol '^' *> ((base :^:) . read <$> spanning1 isDigit)) <|> pure base
atom =
  (Num . read <$> spanning1 isDigit)
    <|> (symbol '(' *> expr <* symbol ')')
    <|> (symbol '-' *> ((Num (-1) :*:) <$> power))
    <|> named
  where
    named = spanning1 isAlpha >>= \case
      "x" -> pure X
      word -> case lookup word table of
        Just f -> Fun f <$> (symbol '(' *> expr <* symbol ')')
        Nothing -> empty
    table = [(functionName f, f) | f <- [minBound ..]]

parseExpr :: String -> Either String Expr
parseExpr input = case runParser expr (dropWhile isSpace input) of
  Just (e, "") -> Right e
  Just (_, rest) -> Left ("cannot continue at column " ++ show (length input - length rest + 1))
  Nothing -> Left "not a formula"

-- Calculus -----------------------------------------------------------------

derivative :: Expr -> Expr
derivative = simplify . d
  where
    d = \case
      Num _ -> Num 0
      X -> Num 1
      a :+: b -> d a :+: d b
      a :*: b -> (d a :*: b) :+: (a :*: d b)
      a :^: n -> Num n :*: (a :^: (n - 1)) :*: d a
      Fun f a -> outer f a :*: d a
    outer Sin a = Fun Cos a
    outer Cos a = Num (-1) :*: Fun Sin a
    outer Exp a = Fun Exp a

-- | Bottom-up rewriting. One pass suffices for neutral elements and constant folding because each
-- rule looks only at children that are already in simplest form.
simplify :: Expr -> Expr
simplify = \case
  a :+: b -> plus (simplify a) (simplify b)
  a :*: b -> times (simplify a) (simplify b)
  a :^: n -> raise (simplify a) n
  Fun f a -> Fun f (simplify a)
  leaf -> leaf
  where
    plus (Num 0) b = b
    plus a (Num 0) = a
    plus (Num m) (Num n) = Num (m + n)
    plus a b = a :+: b

    times (Num 0) _ = Num 0
    times _ (Num 0) = Num 0
    times (Num 1) b = b
    times a (Num 1) = a
    times (Num m) (Num n) = Num (m * n)
    times (Num m) (Num n :*: b) = times (Num (m * n)) b
    times a b = a :*: b

    raise _ 0 = Num 1
    raise a 1 = a
    raise (Num m) n = Num (m ^ n)
    raise a n = a :^: n

eval :: Double -> Expr -> Double
eval x = \case
  Num n -> fromInteger n
  X -> x
  a :+: b -> eval x a + eval x b
  a :*: b -> eval x a * eval x b
  a :^: n -> eval x a ^^ n
  Fun f a -> function f (eval x a)
  where
    function Sin = sin
    function Cos = cos
    function Exp = exp

-- Printing -----------------------------------------------------------------

functionName :: Name -> String
functionName Sin = "sin"
functionName Cos = "cos"
functionName Exp = "exp"

pretty :: Expr -> String
pretty e = go 0 e ""
  where
    go :: Int -> Expr -> ShowS
    go p = \case
      Num n -> showParen (n < 0 && p > 6) (shows n)
      X -> showChar 'x'
      a :+: b -> showParen (p > 6) (go 6 a . showString " + " . go 6 b)
      a :*: b -> showParen (p > 7) (go 7 a . showString " * " . go 7 b)
      a :^: n -> go 9 a . showChar '^' . shows n
      Fun f a -> showString (functionName f) . showParen True (go 0 a)
