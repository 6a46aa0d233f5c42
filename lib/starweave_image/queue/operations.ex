defmodule StarweaveImage.Queue.Operations do
  @moduledoc false
  # Operations on all sidecars, such as loading a model: each goes to every sidecar that is at work when it begins, and
  # is answered when all of these have answered or are gone. Pure; the queue sends messages and replies.

  alias StarweaveImage.Error

  # id → `%{from, message, left, error}`; `left` is nil until a sidecar is at work.
  @opaque t :: %{String.t() => map}
  @type index :: pos_integer
  @typedoc "A caller to answer, and the answer."
  @type answer :: {from :: term, :ok | {:error, Error.t()}}

  @spec new() :: t
  def new, do: %{}

  @spec add(t, String.t(), map, term) :: t
  def add(operations, id, message, from),
    do: Map.put(operations, id, %{from: from, message: message, left: nil, error: nil})

  @spec known?(t, String.t()) :: boolean
  def known?(operations, id), do: is_map_key(operations, id)

  @doc "Whether the sidecar still has an operation to do."
  @spec busy?(t, index) :: boolean
  def busy?(operations, index),
    do: Enum.any?(operations, fn {_, %{left: left}} -> left != nil and index in left end)

  @doc "Begins pending operations on the sidecars at work; returns the messages to send to each of them."
  @spec begin(t, [index]) :: {[map], t}
  def begin(operations, []), do: {[], operations}

  def begin(operations, at_work) do
    Enum.flat_map_reduce(operations, operations, fn
      {id, %{left: nil} = operation}, operations ->
        begun = %{operation | left: MapSet.new(at_work)}
        {[operation.message], Map.put(operations, id, begun)}

      _begun, operations ->
        {[], operations}
    end)
  end

  @doc "One of the sidecars has done the operation, or has failed with an error."
  @spec done(t, String.t(), index, Error.t() | nil) :: {[answer], t}
  def done(operations, id, index, error) do
    operation = operations[id]
    left = MapSet.delete(operation.left || MapSet.new(), index)
    error = operation.error || error

    if MapSet.size(left) == 0,
      do:
        {[{operation.from, if(error, do: {:error, error}, else: :ok)}],
         Map.delete(operations, id)},
      else: {[], Map.put(operations, id, %{operation | left: left, error: error})}
  end

  @doc "A sidecar is gone; with `down?`, no other one will be at work either."
  @spec lost(t, index, boolean, Error.t()) :: {[answer], t}
  def lost(operations, index, down?, error) do
    concerned =
      for {id, %{left: left}} <- operations,
          if(left, do: index in left, else: down?),
          do: id

    Enum.flat_map_reduce(concerned, operations, &done(&2, &1, index, error))
  end
end
