defmodule StarweaveImage.Result do
  @moduledoc """
  A finished result that is neither a picture nor a text: the encoded file and everything that made it.

  `media_type` says what file `data` is, such as `"model/gltf-binary"`, and `facts` what else is known of it, as JSON has
  it: maps with text as keys. The other fields are those of `StarweaveImage.Image`.
  """

  alias StarweaveImage.{Image, Text}

  @type kind :: :vector | :video | :mesh
  @type t :: %__MODULE__{
          id: String.t(),
          index: non_neg_integer,
          kind: kind,
          media_type: String.t(),
          data: binary,
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

  @typedoc "Whatever a request may end with."
  @type any_kind :: Image.t() | Text.t() | t

  @enforce_keys [:id, :kind, :media_type, :data, :sha256]
  defstruct [
    :id,
    :kind,
    :media_type,
    :data,
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

  @doc """
  The bytes of a result of any kind.

      iex> StarweaveImage.Result.data(%StarweaveImage.Text{id: "a", text: "an apple", sha256: ""})
      "an apple"
  """
  @spec data(any_kind) :: binary
  def data(%Text{text: text}), do: text
  def data(%{data: data}), do: data

  @doc false
  @spec put_data(any_kind, binary) :: any_kind
  def put_data(%Text{} = text, data), do: %{text | text: data}
  def put_data(result, data), do: %{result | data: data}

  defimpl Inspect do
    import Inspect.Algebra

    def inspect(result, opts) do
      shown = result |> Map.from_struct() |> Map.update!(:data, &{:bytes, byte_size(&1)})
      concat(["#StarweaveImage.Result<", to_doc(Map.delete(shown, :parameters), opts), ">"])
    end
  end
end
