defmodule StarweaveImage.Queue.RankedSet do
  @moduledoc false
  # An ordered set that also knows the rank of each element, each operation in O(log n): a weight-balanced
  # tree (Adams 1993) with the parameters of Hirai and Yamamoto, "Balancing weight-balanced trees", 2011.

  @delta 3
  @gamma 2

  @type t(element) :: nil | {pos_integer, element, t(element), t(element)}
  @type t :: t(term)

  @spec new() :: t
  def new, do: nil

  @spec size(t) :: non_neg_integer
  def size(nil), do: 0
  def size({size, _, _, _}), do: size

  @spec first(t(element)) :: element | nil when element: term
  def first(nil), do: nil
  def first({_, element, nil, _}), do: element
  def first({_, _, left, _}), do: first(left)

  @spec put(t, term) :: t
  def put(nil, element), do: {1, element, nil, nil}

  def put({_, root, left, right} = tree, element) do
    cond do
      element < root -> balance(root, put(left, element), right)
      element > root -> balance(root, left, put(right, element))
      true -> tree
    end
  end

  @spec delete(t, term) :: t
  def delete(nil, _element), do: nil

  def delete({_, root, left, right}, element) do
    cond do
      element < root -> balance(root, delete(left, element), right)
      element > root -> balance(root, left, delete(right, element))
      left == nil -> right
      right == nil -> left
      true -> balance(first(right), left, delete(right, first(right)))
    end
  end

  @doc "How many elements are not after `element`: its position from 1, if it is in the set."
  @spec rank(t, term) :: non_neg_integer
  def rank(nil, _element), do: 0

  def rank({_, root, left, right}, element) do
    if element < root,
      do: rank(left, element),
      else: size(left) + 1 + rank(right, element)
  end

  @doc "The first `count` elements, in time that grows with `count`."
  @spec take(t(element), non_neg_integer) :: [element] when element: term
  def take(tree, count), do: tree |> take(count, []) |> elem(1) |> Enum.reverse()

  defp take(tree, left, taken) when tree == nil or left == 0, do: {left, taken}

  defp take({_, root, before, past}, left, taken) do
    case take(before, left, taken) do
      {0, taken} -> {0, taken}
      {left, taken} -> take(past, left - 1, [root | taken])
    end
  end

  @spec to_list(t(element)) :: [element] when element: term
  def to_list(tree), do: to_list(tree, [])

  defp to_list(nil, after_it), do: after_it

  defp to_list({_, root, left, right}, after_it),
    do: to_list(left, [root | to_list(right, after_it)])

  defp node(root, left, right), do: {size(left) + size(right) + 1, root, left, right}

  defp weight(tree), do: size(tree) + 1

  defp balance(root, left, right) do
    cond do
      weight(right) > @delta * weight(left) -> lean_left(root, left, right)
      weight(left) > @delta * weight(right) -> lean_right(root, left, right)
      true -> node(root, left, right)
    end
  end

  defp lean_left(root, left, {_, pivot, inner, outer}) do
    if weight(inner) < @gamma * weight(outer) do
      node(pivot, node(root, left, inner), outer)
    else
      {_, middle, before, past} = inner
      node(middle, node(root, left, before), node(pivot, past, outer))
    end
  end

  defp lean_right(root, {_, pivot, outer, inner}, right) do
    if weight(inner) < @gamma * weight(outer) do
      node(pivot, outer, node(root, inner, right))
    else
      {_, middle, before, past} = inner
      node(middle, node(pivot, outer, before), node(root, past, right))
    end
  end
end
