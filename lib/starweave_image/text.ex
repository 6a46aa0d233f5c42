defmodule StarweaveImage.Text do
  @moduledoc """
  A finished text, such as what a model says of a picture, and everything that made it.

  `facts` are what else the model tells, as JSON has it: maps with text as keys. The other fields are those of
  `StarweaveImage.Image`.
  """

  @type t :: %__MODULE__{
          id: String.t(),
          index: non_neg_integer,
          text: String.t(),
          facts: map,
          sha256: String.t(),
          model: String.t() | nil,
          prompt: String.t() | nil,
          seed: non_neg_integer | nil,
          parameters: map,
          timings: %{optional(atom) => non_neg_integer},
          notices: [String.t()],
          attempts: pos_integer
        }

  @enforce_keys [:id, :text, :sha256]
  defstruct [
    :id,
    :text,
    :sha256,
    :model,
    :prompt,
    :seed,
    index: 0,
    facts: %{},
    parameters: %{},
    timings: %{},
    notices: [],
    attempts: 1
  ]
end
